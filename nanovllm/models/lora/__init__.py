"""LoRA adapters: their files as PEFT writes them (`peft_config`, `adapter_file`), the slots of the
layers (`slots`), and the products that add them (`regions`)."""
