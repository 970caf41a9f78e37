"""What media a prompt may have, and where they may come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class MediaOptions:
    """Limits and permissions. All limits are at least 1.

    allowed_media_domains: hosts that remote URLs may name, as "host" (port 443) or "host:port".
        https only, without redirects. Empty: remote URLs are refused.
    allowed_local_media_path: the folder below which local paths are read. None: local paths are
        refused.
    max_images, max_videos: images and videos of one prompt.
    max_video_frames: frames of one video, after sampling.
    max_image_pixels: pixels of one image or frame, checked before it is decoded.
    max_item_bytes: bytes of one encoded image or video file.
    max_prompt_bytes: bytes of all encoded images and video files of one prompt.
    max_patches_bytes: bytes of the patches of one image or video.
    media_timeout_s: seconds for one remote download, in all.
    num_media_workers: threads that decode, resize and patch.
    media_cache_bytes: bytes of prepared images and videos that are kept for later prompts.
    """

    allowed_media_domains: tuple[str, ...] = ()
    allowed_local_media_path: Path | None = None
    max_images: int = 32
    max_videos: int = 2
    max_video_frames: int = 768
    max_image_pixels: int = 64 * MIB
    max_item_bytes: int = 64 * MIB
    max_prompt_bytes: int = 256 * MIB
    max_patches_bytes: int = 1024 * MIB
    media_timeout_s: float = 10.0
    num_media_workers: int = 8
    media_cache_bytes: int = 256 * MIB

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "media_cache_bytes" else 1
            if name == "media_timeout_s":
                if not value > 0:
                    raise ValueError(f"{name} is {value!r}: it must be a number above 0")
            elif isinstance(value, int) and value < least:
                raise ValueError(f"{name} is {value!r}: it must be at least {least}")
        for domain in self.allowed_media_domains:
            if not domain or any(sign in domain for sign in "/@* \\"):
                raise ValueError(
                    f"allowed_media_domains has {domain!r}: it must be 'host' or 'host:port'"
                )
        if self.allowed_local_media_path is not None:
            folder = Path(os.path.expanduser(self.allowed_local_media_path)).resolve()
            if not folder.is_dir():
                raise ValueError(
                    f"allowed_local_media_path is {str(self.allowed_local_media_path)!r}: "
                    "it must be a folder"
                )
            object.__setattr__(self, "allowed_local_media_path", folder)
