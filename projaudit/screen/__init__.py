"""Which samples of a fine-tuning set carry a trigger, by the attention of the tuned model."""
