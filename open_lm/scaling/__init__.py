"""Plan ladders of small models, train them, and predict the loss and error of larger ones.

ladder.py       runs of a ladder: sizes, tokens, batch, learning rate; shapes.py: their models
ladder_files.py the folder of a ladder; jobs.py, run_command.py: train and evaluate it; speed.py: estimate its time
collect.py      run folders and exports to a table of runs
runs.py         table of runs and its JSON form
laws.py         laws of the loss, as a registry
solve.py        minimization of residuals
error_law.py    downstream error as a function of loss
points.py       runs that a fit uses
candidates.py   default procedure: fits compared by leave-one-scale-out, and their average
resampling.py   intervals by bootstrap
fitting.py      fit and predict
sweep*.py       the best setting of each width: grid, fit, command, page
coordinate_*.py sizes of activations over the width
command.py      command line, `python -m open_lm.scaling`
"""
