"""Files of sound, made by PyAV."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def tone(num_samples: int, rate: int, hz: float = 440, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(np.arange(num_samples) * 2 * np.pi * hz / rate)).astype(np.float32)


def sound_file(kind: str, codec: str, channels_CN: np.ndarray, rate: int, **options: str) -> bytes:
    """A file of floats between -1 and 1; `kind` is FFmpeg's name of a container."""
    file = io.BytesIO()
    layout = LAYOUTS[len(channels_CN)]
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout, options=options)
        write(container, stream, channels_CN, rate)
    return file.getvalue()


def write(container: Any, stream: Any, channels_CN: np.ndarray, rate: int) -> None:
    """Writes all samples to a stream of a container."""
    layout = LAYOUTS[len(channels_CN)]
    packed = np.ascontiguousarray(channels_CN.T, dtype=np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, "flt", layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    context = stream.codec_context
    context.open(strict=False)
    fitting: Any = av.AudioResampler(
        format=stream.format.name, layout=layout, rate=rate, frame_size=context.frame_size or None
    )
    for one in [*fitting.resample(frame), *fitting.resample(None)]:
        container.mux(stream.encode(one))
    container.mux(stream.encode())
