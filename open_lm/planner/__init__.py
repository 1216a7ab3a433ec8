"""What a training run takes: memory, time, disk. Pure functions of plain values, without torch and without a device.

    shapes.py       a model's weights, by name and size, and its FLOPs
    activations.py  what a block keeps for its backward pass: one table that mirrors model.py
    memory.py       bytes of a rank at each phase of a step
    traffic.py      bytes that a step exchanges, and the time that they take
    report.py       all of it as text

`python -m open_lm.planner.command` is the command.
"""
