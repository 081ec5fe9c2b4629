"""Fine-tuning sets, some poisoned, and models tuned on them, to try `projaudit screen` on."""
