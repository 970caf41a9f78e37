"""Multimodal inputs: from users' images, videos and audio to patches, mel features and token ids.
No model, no engine.

`given` parses the forms of prompts, `settings` a checkpoint's processor files, `prepare` runs
decoding, patching and features in threads, `placeholders` expands the prompt.
"""
