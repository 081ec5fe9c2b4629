"""What the target does when it runs, by its own language model, tokenizer and vision tower.

From the bottom up: `reasons` (why nothing was run), `stage` (which files a run may see), `sandbox`
(a process of its own, and what that may do), `child` (what runs in there).
"""
