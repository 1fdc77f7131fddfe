"""How runs begin and end: promptly if cancelled, for good if they crash again and again, without tracebacks."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.states import Failed

from t2vz.errors import T2VZError

MOST_CRASHES = 5
_GRACE_S = 10.0  # rows have 8 s of them; a worker tells of a cancellation within some, and all shall be over in 15
_EXIT_CODE = 128 + signal.SIGTERM


def begin() -> Any:
    """What every run of a flow that renders begins with; a state if it is to end in that at once, else None."""
    hide_tracebacks()
    end_promptly()
    return given_up()


def end_promptly(grace_s: float = _GRACE_S) -> None:
    """Bound what is left of this process once it gets SIGTERM, which is how a worker cancels a run.

    Rows end at their next step, frame or stage. One that does not in time (a step of many large frames) would hold
    the process until the worker kills it after 30 s: it ends itself then, which every part of a run is made to bear.
    Does nothing but in a process of the run's own.
    """
    if "PREFECT__FLOW_RUN_ID" not in os.environ or threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(grace_s, os._exit, (_EXIT_CODE,))
        timer.daemon = True
        timer.start()
        if callable(before):
            before(number, frame)  # Prefect's own, which unwinds the flow
        else:
            raise SystemExit(_EXIT_CODE)

    signal.signal(signal.SIGTERM, end)


def given_up(most: int = MOST_CRASHES) -> Any:
    """A Failed state if this run has crashed so often without coming to another end meanwhile; else None.

    An automation starts crashed runs again (infra/automations.yaml), and Prefect has no limit for that. A run that is
    started again by hand has as many tries as before.
    """
    if runtime.flow_run.run_count <= 1:
        return None
    crashes = 0
    with get_client(sync_client=True) as client:
        for state in sorted(client.read_flow_run_states(runtime.flow_run.id), key=lambda state: state.timestamp):
            if state.is_crashed():
                crashes += 1
            elif state.is_final():
                crashes = 0
    if crashes < most:
        return None
    return Failed(message=f"crashed {crashes} times: given up; see the logs of its tries, then start it again")


def hide_tracebacks() -> None:
    """Let Prefect's logs tell an error of ours by its message: it is expected, and says what to do."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if error is None or isinstance(error, T2VZError):
        record.exc_info = None
    return True
