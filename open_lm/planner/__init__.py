"""Predict the memory, time and disk space of a training run. Pure functions of plain values, without torch or a device.

shapes.py       the weights of a model by name and size, and its FLOPs
activations.py  the activations that a block saves for its backward pass, as a table that mirrors open_lm.model
memory.py       the memory of a rank in each phase of a step
efficiency.py   the MFU of a step by device, model and sequence length, from published runs
speed.py        the speed of a device, from flags, measurements or the tables
traffic.py      the bytes that ranks exchange in a step, and the time of a step
strategies.py   the ways to distribute a training run, and the choice between them
checkpoints.py  the number and size of checkpoints
costs.py        the device hours, energy and price of a run
report.py       the plan as text and as JSON
command.py      the command line, `python -m open_lm.plan`
"""
