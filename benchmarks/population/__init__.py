"""Honest and backdoored projector fine-tunes of several bases, to calibrate a detector by."""
