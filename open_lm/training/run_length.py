"""Find settings that contradict the length of the run, such as a warmup that is longer than it."""

from __future__ import annotations

from open_lm.config.diagnostics_section import parse_steps
from open_lm.config.registry import SCHEDULES
from open_lm.config.sections import Config, OptimConfig
from open_lm.optim.averaging import parse_averagers
from open_lm.optim.schedules import Schedule

_SUDDEN_FALL = 0.05  # a fall of the learning rate in one step by this fraction of its peak
_WARMUP_PART = 50  # a usual warmup takes a fiftieth of the steps


def run_length_problems(config: Config, schedule: Schedule, total_steps: int) -> list[str]:
    """Describe the settings that contradict a run of `total_steps` steps, with the way out.

    `schedule` is called with several steps; a schedule that sets a learning rate is left at that of one of them.
    """
    problems = [] if config.optim.skip_scheduler else _schedule_problems(config.optim, schedule, total_steps)
    checkpoint = config.checkpoint
    periods = [
        ("--save-every-n-steps", checkpoint.save_every_n_steps, "saves only at the ends of epochs"),
        ("--save-milestone-every", checkpoint.save_milestone_every, "keeps no milestone"),
    ]
    for averager in parse_averagers(config.optim.averagers) if config.optim.averagers else ():
        periods.append((f"--averagers {averager.name}: a period of", averager.freq, "never averages"))
    problems += [
        f"{flag} {period} is longer than the run, which has {total_steps} steps and {effect}; set a shorter period"
        for flag, period, effect in periods
        if period > total_steps
    ]
    steps = config.diagnostics.profile_steps
    if steps is not None and parse_steps(steps).start >= total_steps:
        problems.append(f"--profile-steps {steps} traces nothing: the run has only {total_steps} steps, from 0")
    return problems


def _schedule_problems(cfg: OptimConfig, schedule: Schedule, total_steps: int) -> list[str]:
    """Compare the warmup and the decay with the steps of the run; works for any registered schedule."""
    if cfg.warmup >= total_steps:
        advice = max(1, total_steps // _WARMUP_PART)
        return [
            f"--warmup {cfg.warmup}: the run has only {total_steps} steps, so the learning rate rises to "
            f"{schedule(total_steps - 1):.3g} of --lr {cfg.lr:g} and --lr-scheduler {cfg.lr_scheduler} has no effect; "
            f"lower --warmup, for example to {advice}, or train for more steps"
        ]
    setting = SCHEDULES.fact(cfg.lr_scheduler, "decay_length")
    flag = f"--{setting.replace('_', '-')}" if setting else ""
    first, final = schedule(cfg.warmup), max(cfg.lr_cooldown_end, cfg.force_min_lr)
    if cfg.warmup and first < (1 - _SUDDEN_FALL) * cfg.lr:
        shorter = f", lower {flag}" if flag else ""
        return [
            f"--warmup {cfg.warmup}: --lr-scheduler {cfg.lr_scheduler} lowers the learning rate before the warmup "
            f"ends, so it falls from {cfg.lr:g} to {first:.3g} in one step (of {total_steps}); lower "
            f"--warmup{shorter}, or train for more steps"
        ]
    if setting and getattr(cfg, setting) and final < cfg.lr and schedule(total_steps - 1) >= cfg.lr:
        return [
            f"{flag} {getattr(cfg, setting)}: of {total_steps} steps this leaves none with a lower learning rate, so "
            f"the run ends at --lr {cfg.lr:g}; raise {flag}, or train for more steps"
        ]
    return []
