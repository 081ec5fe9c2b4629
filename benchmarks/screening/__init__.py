"""Fine-tuning sets with and without poison, and the models tuned on them, for `projaudit screen`."""
