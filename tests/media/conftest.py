from tests.media.vision_cases import case, qwen3, without_torchvision

__all__ = ["case", "qwen3", "without_torchvision"]
