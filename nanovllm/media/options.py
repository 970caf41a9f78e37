"""Limits on the media of a prompt, and their allowed sources."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike
from pathlib import Path

MIB = 1 << 20
PER_PROMPT = ("max_images", "max_videos", "max_audios")
MAY_BE_ZERO = (*PER_PROMPT, "media_cache_bytes", "embedding_cache_bytes")


@dataclass(frozen=True)
class MediaOptions:
    """Limits and permissions. Counts and caches can be 0, all other limits are at least 1.

    allowed_media_domains: hosts that remote URLs may name, as "host" (port 443) or "host:port".
        https only, without redirects. Empty: remote URLs are refused.
    allowed_local_media_path: the folder from which local paths are read. None: local paths are
        refused.
    max_images, max_videos: images and videos of one prompt.
    max_video_frames: frames of one video, after sampling.
    max_audios: audio clips of one prompt.
    max_audio_s: seconds of one clip.
    max_image_pixels: pixels of one image or frame, checked before it is decoded.
    max_video_pixels: pixels of all frames of one video file, checked before it is decoded.
    max_item_bytes: bytes of one encoded image, video or audio file.
    max_prompt_bytes: bytes of all encoded images, videos and clips of one prompt.
    max_patches_bytes: bytes of the patches of one image or video.
    media_timeout_s: seconds for one remote download, in all.
    decode_timeout_s: seconds to decode one file, after which its decoder is ended.
    max_decoding_bytes: memory of all decoders. An image or frame counts as 24 bytes per pixel,
        audio as 8 per sample of the longest clip. A file that alone exceeds the limit is decoded
        when no other large one is.
    num_media_workers: threads that decode, resize and patch the media of one prompt. There is one
        more for other prompts. Each has a decoder process, which starts on first use.
    media_cache_bytes: bytes of prepared images, videos and clips kept for later prompts.
    embedding_cache_bytes: bytes of embeddings on the device kept for later prompts.
    max_held_bytes: bytes of patches of unfinished requests above which no further prompt is
        prepared.
    """

    allowed_media_domains: tuple[str, ...] = ()
    allowed_local_media_path: str | PathLike[str] | None = None
    max_images: int = 32
    max_videos: int = 2
    max_video_frames: int = 768
    max_audios: int = 8
    max_audio_s: float = 300.0
    max_image_pixels: int = 64 * MIB
    max_video_pixels: int = 65536 * MIB
    max_item_bytes: int = 64 * MIB
    max_prompt_bytes: int = 256 * MIB
    max_patches_bytes: int = 1024 * MIB
    media_timeout_s: float = 10.0
    decode_timeout_s: float = 30.0
    max_decoding_bytes: int = 2048 * MIB
    num_media_workers: int = 8
    media_cache_bytes: int = 256 * MIB
    embedding_cache_bytes: int = 512 * MIB
    max_held_bytes: int = 4096 * MIB

    def __post_init__(self) -> None:
        for one in fields(self):
            name, value = one.name, getattr(self, one.name)
            least = 0 if name in MAY_BE_ZERO else 1
            if type(one.default) is float and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}: it must be a number above 0")
            if type(one.default) is int and not (type(value) is int and value >= least):
                raise ValueError(
                    f"{name} is {value!r}: it must be a whole number, at least {least}"
                )
        for domain in self.allowed_media_domains:
            if not domain or any(sign in domain for sign in "/@* \\"):
                raise ValueError(
                    f"allowed_media_domains has {domain!r}: it must be 'host' or 'host:port'"
                )
        if self.allowed_local_media_path is not None and not self.local_folder.is_dir():
            raise ValueError(
                f"allowed_local_media_path is {str(self.allowed_local_media_path)!r}: "
                "it must be a folder"
            )

    @cached_property
    def local_folder(self) -> Path:
        """`allowed_local_media_path`, which must be set, without symlinks."""
        assert self.allowed_local_media_path is not None
        return Path(self.allowed_local_media_path).expanduser().resolve()


# the fields that `EngineConfig.media_limits` may name
LIMITS = tuple(
    one.name
    for one in fields(MediaOptions)
    if not one.name.startswith("allowed_") and one.name not in PER_PROMPT
)
