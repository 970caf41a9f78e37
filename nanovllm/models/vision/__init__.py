"""Vision encoders ("towers"): patches of images and video frames to embeddings of placeholders."""
