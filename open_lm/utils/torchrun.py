"""torchrun that leaves the training script its flags, and its ranks the time to save when they are asked to stop.

Before Python 3.12.3 `torchrun -m open_lm.main … --logs DIR` ends in "ambiguous option: --logs could match
--logs-specs" (https://github.com/pytorch/pytorch/issues/120601). Here the command line is split at the script, so that
nothing behind it is torchrun's business:

    python -m open_lm.utils.torchrun --nproc-per-node 2 -m open_lm.main --logs logs …

takes exactly torchrun's arguments. `make install` makes it the environment's torchrun.

With --node-rank, ranks follow it under every rendezvous: node 0 holds rank 0. torchrun itself orders the nodes of a
c10d rendezvous by their names.

It also hands on the signals with which a scheduler asks a run to stop, SIGTERM and SIGUSR1: the workers get them and
all the time they take to save, and the exit code is 0 when theirs is. torchrun itself ends them after half a minute and
reports a failure, or dies of SIGUSR1 without them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from open_lm.errors import HUNG, STOP_SIGNALS

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

OWN_MESSAGE = (2, 130, HUNG)  # exit codes of errors.run_cli and of the watchdog
FAILURE_FILE = "OPEN_LM_FAILURE_FILE"  # the variable that names a file, which gets the time of a rank's failure
_FIRST_WORD_S = 2  # what is left to the node that ended, and so took the rendezvous with it, to say why
_SCRIPT = """#!{python}
import sys

from open_lm.utils.torchrun import main

sys.exit(main(sys.argv[1:]))
"""


def split_command(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """torchrun's own arguments up to and with the training script, and the arguments of that script.

    A "--" between the two, with which other scripts help themselves, belongs to neither.
    """
    index = 0
    while index < len(argv) and argv[index].startswith("-"):
        name, has_value, _ = argv[index].partition("=")
        action = parser._option_string_actions.get(name)
        takes_next = action is not None and action.nargs != 0 and not has_value
        index += 2 if takes_next else 1
    script_args = list(argv[index + 1 :])
    return list(argv[: index + 1]), script_args[1:] if script_args[:1] == ["--"] else script_args


def agent_class(node_rank: int = 0) -> type[LocalElasticAgent]:
    """torch's agent, which starts and watches the workers of a node, with the signals handed on to them.

    Ranks follow the nodes' `node_rank`; where those are equal, the order that the rendezvous finds.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        def _start_workers(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
            pids = super()._start_workers(*args, **kwargs)

            def hand_on(number: int, _frame: FrameType | None) -> None:
                self._remaining_restarts = 0  # who is asked to stop is not started anew
                for pid in pids.values():
                    with suppress(ProcessLookupError):  # it has ended already
                        os.kill(pid, number)

            for number in STOP_SIGNALS:  # after torch, which has just set its own handlers
                signal.signal(number, hand_on)
            return pids

        def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: Any) -> list[Any]:
            store.set(f"open_lm/node/{group_rank}", str(node_rank))
            nodes = [(int(store.get(f"open_lm/node/{node}")), node) for node in range(group_world_size)]
            place = sorted(nodes).index((node_rank, group_rank))
            return super()._assign_worker_ranks(store, place, group_world_size, spec)

    return Agent


def main(argv: Sequence[str]) -> int:
    """Launch as torchrun does; the exit code.

    Where a rank ended with a message of its own (exit code 2), an interrupt, its watchdog or a signal to stop that came
    before it could take it, torchrun's traceback is left out.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher import api
    from torch.distributed.run import get_args_parser, parse_args, run

    own, script_args = split_command(argv, get_args_parser())
    args = parse_args(own)
    args.training_script_args = script_args
    if args.nproc_per_node == "gpu" and not torch.cuda.is_available():
        print("error: --nproc-per-node gpu: torch finds no CUDA device here; give a number of ranks", file=sys.stderr)
        return 2
    api.LocalElasticAgent = agent_class(args.node_rank)  # type: ignore[misc]
    if args.rdzv_backend != "static":
        args.node_rank = 0  # else torch warns that it does not look at it
    try:
        run(args)
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        if FAILURE_FILE in os.environ:
            Path(os.environ[FAILURE_FILE]).write_text(str(failure.timestamp))
        code = failure.exitcode
        if -code in STOP_SIGNALS:
            return 128 - code
        if code not in OWN_MESSAGE:
            raise
        return int(code)
    except RendezvousConnectionError as error:
        time.sleep(_FIRST_WORD_S)
        said = f"{error.__cause__ or error}".partition("\n")[0]
        print(
            f"error: no connection to the rendezvous at {args.rdzv_endpoint} ({said}): the node that keeps it is not "
            "reached, or has ended",
            file=sys.stderr,
        )
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def replace_script(folder: Path) -> None:
    """Make this the `torchrun` of an environment's script folder."""
    path = folder / "torchrun"
    path.write_text(_SCRIPT.format(python=sys.executable))
    path.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
