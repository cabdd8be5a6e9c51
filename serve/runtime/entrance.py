"""Groups on their way into the engine: small ones at once, large ones piece by piece, and those whose grammar is still
to be compiled, or to follow what was generated before, only when other threads have done that.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from apt_jax.engine.interface import ServingEngine
from apt_jax.output import QueueFull
from apt_jax.serve.errors import EngineFailure, PredictedLate
from apt_jax.serve.runtime.admission import Admission
from apt_jax.serve.runtime.group import SAMPLES_AT_ONCE, Active, Entry, Group, Mail, Message, Prepared
from apt_jax.serve.runtime.samples import record_of
from apt_jax.tokenization.restriction import restriction

logger = logging.getLogger("apt_jax.serve")

SEE_LOG = "its log has the details"
MAX_THREADS = 16  # they wait for other processes


class Entrance:
    """True while a group is to enter between two steps. For the engine's thread.

    Args:
        put: sends a message to that thread; from any.
        mail: for the groups.
        active: what the engine has been given, by id.

    Attributes:
        admission: refuses what would miss its SLO, if there is one.
    """

    def __init__(self, put: Callable[[Message], None], mail: Mail, active: dict[str, Active]):
        self.admission: Admission | None = None
        self._put, self._mail, self._active = put, mail, active
        self._ready: deque[Entry] = deque()
        self._preparing: list[Entry] = []
        self._threads: ThreadPoolExecutor | None = None

    def __bool__(self) -> bool:
        return bool(self._ready)

    def begin(self, engine: ServingEngine, entry: Entry) -> None:
        """A group has come."""
        if len(entry.group.samples) > SAMPLES_AT_ONCE:
            self._ready.append(entry)
        else:
            self._admit(engine, entry)

    def prepared(self, engine: ServingEngine, entry: Entry) -> bool:
        """One that had to be prepared goes on, if it is still wanted; whether it is to end at once."""
        if entry not in self._preparing:
            return False
        self._preparing.remove(entry)
        self.begin(engine, entry)
        return entry.is_to_end

    def admit_next(self, engine: ServingEngine) -> None:
        """Let a piece of a large group in, if there is one."""
        if self._ready:
            self._admit(engine, self._ready.popleft())

    def drop(self, group: Group) -> None:
        """Nobody wants it any more."""
        self._ready = deque(entry for entry in self._ready if entry.group is not group)
        self._preparing = [entry for entry in self._preparing if entry.group is not group]

    def hurry(self, engine: ServingEngine, group: Group) -> None:
        """Let all of a group in, for it to end; later, if it is being prepared."""
        while entries := [entry for entry in self._ready if entry.group is group]:
            self._ready.remove(entries[0])
            self._admit(engine, entries[0])
        for entry in self._preparing:
            entry.is_to_end |= entry.group is group

    def hurry_all(self, engine: ServingEngine, error: Exception) -> None:
        """`hurry` for all groups; those that are being prepared fail."""
        while self._ready:
            self._admit(engine, self._ready.popleft())
        self.fail_prepared(error)

    def take_ready(self) -> list[Group]:
        """The large groups, which come no further."""
        groups = [entry.group for entry in self._ready]
        self._ready.clear()
        return groups

    def fail_prepared(self, error: Exception) -> None:
        """Those that are being prepared come no further."""
        for entry in self._preparing:
            self._mail.add(partial(entry.group.fail, error))
        self._preparing = []

    def close(self, error: Exception) -> None:
        """No group comes any more."""
        self.fail_prepared(error)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _admit(self, engine: ServingEngine, entry: Entry) -> None:
        """Give the engine the next samples of a group, all or none of which it takes in the end."""
        group = entry.group
        if group.closed:
            return
        try:
            if entry.error is not None:
                raise entry.error
            if not (entry.added or entry.restrictions) and _would_wait(engine, group):
                self._prepare(engine, entry)
                return
            if not entry.added and self.admission is not None:
                self.admission.check(engine, group.samples)
            for sample in entry.left[:SAMPLES_AT_ONCE]:
                record = record_of(sample.add_to(engine, entry.next_restriction))
                self._active[sample.request_id] = Active(group, sample, record)
                entry.added.append(sample.request_id)
        except Exception as error:
            for request_id in entry.added:
                self._active.pop(request_id, None)  # it may have ended
                engine.abort(request_id)
            if not isinstance(error, ValueError | QueueFull | PredictedLate):
                logger.exception("the engine failed to take a request")
                error = EngineFailure(f"the engine failed to take this request; {SEE_LOG}")
            self._mail.add(partial(group.fail, error))
        else:
            if entry.left:
                self._ready.append(entry)
            else:
                self._mail.add(group.accept)

    def _prepare(self, engine: ServingEngine, entry: Entry) -> None:
        """Have what its samples restrict found; `Prepared` then comes. Raises QueueFull if there are too many."""
        if len(self._preparing) >= engine.config.max_num_queued_reqs:
            raise QueueFull(f"{len(self._preparing)} requests wait for their grammars; try again later")
        if self._threads is None:
            self._threads = ThreadPoolExecutor(MAX_THREADS, "grammars")
        try:
            self._threads.submit(self._find, engine, entry)
        except RuntimeError as error:
            raise QueueFull(f"no thread can be started to wait for a grammar ({error}); try again later") from error
        self._preparing.append(entry)

    def _find(self, engine: ServingEngine, entry: Entry) -> None:
        vocab_size = engine.model_config.vocab_size
        try:
            entry.restrictions = [
                restriction(sample.params, engine.tokenizer, vocab_size, sample.output_token_ids)
                for sample in (() if entry.group.closed else entry.group.samples)
            ]
        except Exception as error:
            entry.error = error
        self._put(Prepared(entry))


def _would_wait(engine: ServingEngine, group: Group) -> bool:
    """Whether a grammar is to be compiled, or to follow tokens, before the engine can have the group."""
    if engine.tokenizer is None:
        return False
    asked = {}  # the samples of a prompt share it
    for sample in group.samples:
        if (grammar := sample.params.structured_outputs) is not None:
            if sample.output_token_ids:
                return True
            asked[id(grammar)] = grammar
    return not all(map(engine.tokenizer.grammars.is_known, asked.values()))
