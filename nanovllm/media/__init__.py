"""Images, videos and sound of prompts: from what users give to patches, mel features and token ids.
No model, no engine.

`given` reads the forms of prompts, `settings` a checkpoint's processor files, `prepare` runs
decoding, patching and features in threads, `placeholders` expands the prompt.
"""
