"""The protocol of a worker: one JSON object per line. Needs only Python, since it runs in every peer's environment.

A worker module ends with `serve(open_peer)`; `open_peer(folder, dtype, options)` loads the model and returns a function
from prompts (token ids) and a number of new tokens to the new token ids of each prompt, greedy and past any end.
Options: `platform`, cpu or gpu; `dummy`, whether the folder has no weights and some are to be drawn; `engine`, fields
of apt-jax' EngineConfig.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

Generate = Callable[[list[list[int]], int], Iterable[Iterable[int]]]  # of prompts and a number of new tokens


def serve(open_peer: Callable[[str, str, dict[str, Any]], Generate]) -> None:
    """Answer on what was standard output; whatever the peer prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    folder, dtype, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    try:
        started = time.perf_counter()
        generate = open_peer(folder, dtype, options)
        say(ready=True, load_s=time.perf_counter() - started)
        for line in sys.stdin:
            asked = json.loads(line)
            started = time.perf_counter()
            tokens = generate(asked["prompts"], asked["new_tokens"])
            seconds = time.perf_counter() - started
            say(seconds=seconds, tokens=[[int(token) for token in row] for row in tokens])
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        say(error=f"{type(error).__name__}: {text}"[:300])
    answers.close()
    os._exit(0)  # some peers' threads keep a process alive
