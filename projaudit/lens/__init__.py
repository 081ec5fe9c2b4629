"""ProjLens' analyses of a projector's update, on the user's images.

From the bottom up: `result` (what there is to bring back), `triggers`, `drift`, `subspace` and
`decoding` (the formulas), `capture`, `drifting` and `answers` (a model at work), `study` (all of
it, in the process that `child` is), `wish` and `run` (from outside), then `claims`, `figures`,
`documents` and `page`.
"""
