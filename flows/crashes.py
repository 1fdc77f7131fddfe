"""When a run that crashes again and again is given up.

An automation starts crashed runs again (infra/automations.yaml), and Prefect has no limit for that: what crashes its
process every time would crash for ever.
"""

from typing import Any

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.states import Failed

MOST_CRASHES = 5


def given_up(most: int = MOST_CRASHES) -> Any:
    """A Failed state if this run has crashed so often without coming to another end meanwhile; else None.

    So it may be started again by hand, and has as many tries as before.
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
