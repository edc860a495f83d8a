"""Time and memory of this package beside the official algorithms and diffusers' pipeline: `make bench`.

Both sides have the same weights and inputs, and a case is timed only if their results are equal. Rounds are
interleaved, so that what else the machine does falls on both sides.
"""
