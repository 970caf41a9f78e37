"""Images and videos of prompts: from what users give to patches and token ids. No model, no engine.

`given` reads the forms of prompts, `settings` a checkpoint's processor files, `prepare` runs
decoding and patching in threads, `placeholders` expands the prompt.
"""
