"""The decode side of a handoff: fetches what it lacks of a prompt, computes the rest and generates."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Literal

from pyagent_kv_jax.distributed.handoff.messages import Message
from pyagent_kv_jax.errors import InvalidArgumentError, KVCacheError, OutOfBlocksError, TransferError
from pyagent_kv_jax.serving.engine import Engine
from pyagent_kv_jax.serving.generate import one_each
from pyagent_kv_jax.serving.handoff.block_load import DEFAULT_LOAD_OPTIONS, BlockLoad, LoadOptions
from pyagent_kv_jax.serving.handoff.prefill_instance import identity_of, manager_of
from pyagent_kv_jax.serving.handoff.prefill_link import PrefillLink
from pyagent_kv_jax.serving.request import Request
from pyagent_kv_jax.serving.sampling import GREEDY, SamplingParams

OnFailure = Literal["recompute", "fail"]
_PAUSE = 0.0005  # seconds between looks for blocks that are on their way


@dataclasses.dataclass(eq=False)
class HandoffRequest:
    """A prompt at a decode instance.

    Attributes:
        request: as the engine knows it; ``output`` are its tokens.
        num_fetched: blocks that were sent.
        num_present: blocks that were here already and were not.
        transfer_error: why a load failed; the prompt was computed here then, or the request failed too (``failed``).
        failed: whether it ended without an answer.
        is_finished: whether it is over: answered, failed or cancelled.
    """

    request: Request
    num_fetched: int = 0
    num_present: int = 0
    transfer_error: TransferError | None = None
    failed: bool = False
    is_finished: bool = False

    @property
    def token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.request.output


class DecodeInstance:
    """An engine whose prompts are computed elsewhere. All of it runs in one thread.

    What the prefix cache has of a prompt is not sent. Of what is sent nothing can be hit before all of it is here; then
    the request is admitted like any other, and finds its prefix. A load that fails gives back all it took, on both
    sides, and the prompt is computed here, or the request fails, by choice.

    A failure is noticed: at once, where a transfer breaks off; within the link's ``peer_timeout``, where the other side
    falls silent; and at the latest when a load has taken ``LoadOptions.seconds``.
    """

    def __init__(
        self,
        engine: Engine,
        link: PrefillLink,
        model_name: str,
        *,
        on_failure: OnFailure = "recompute",
        options: LoadOptions = DEFAULT_LOAD_OPTIONS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Introduce itself.

        Args:
            engine: its own, around a ``KVCacheManager``.
            link: to a prefill instance.
            model_name: names the weights, the same on both sides; for instance their ``model_fingerprint``.
            on_failure: what becomes of a request whose load fails.
            options: how blocks are fetched.
            clock: in seconds.

        Raises:
            TransferError: the other instance is not there, or has another model, version or geometry.
            ConfigError: another backend, or a cache without rows to spare.
            InvalidArgumentError: another ``on_failure``.
        """
        if on_failure not in ("recompute", "fail"):
            raise InvalidArgumentError(f"on_failure: got {on_failure!r}, want 'recompute' or 'fail'")
        self.engine = engine
        self.on_failure = on_failure
        self.manager, self._num_places = manager_of(engine)
        self._model_name = model_name
        self._options = options
        self._clock = clock
        self._numbers = itertools.count()
        self._waiting: list[HandoffRequest] = []
        self._loads: dict[int, tuple[HandoffRequest, BlockLoad]] = {}
        self._computing: list[tuple[HandoffRequest, BlockLoad | None]] = []
        self.attach(link)

    def attach(self, link: PrefillLink) -> None:
        """Work with another prefill instance from now on; loads under way from the one before fail.

        Raises:
            TransferError: as the constructor.
        """
        link.introduce(identity_of(self.manager, self._model_name))
        self._fail_loads(TransferError("the prefill instance was exchanged for another one"))
        self.link = link

    # -- requests ----------------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], sampling: SamplingParams = GREEDY) -> HandoffRequest:
        """Queue a prompt.

        Raises:
            InvalidArgumentError, RequestTooLongError: as ``Engine.make_request``.
        """
        entry = HandoffRequest(self.engine.make_request(prompt, sampling))
        self._waiting.append(entry)
        return entry

    def cancel(self, entry: HandoffRequest) -> None:
        """Forget a request wherever it is, and give back all it holds, here and there. Passed over if it is over."""
        if entry.is_finished:
            return
        entry.is_finished = True
        self._waiting = [one for one in self._waiting if one is not entry]
        for load_id, (one, load) in list(self._loads.items()):
            if one is entry:
                del self._loads[load_id]
                load.close()
        for one, load_or_none in self._computing:
            if one is entry:
                self.engine.abort(one.request)
                if load_or_none is not None:
                    load_or_none.close()
        self._computing = [pair for pair in self._computing if pair[0] is not entry]
        self._tidy()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> list[HandoffRequest]:
        """Answer all prompts; one finished request each, in their order.

        Raises:
            InvalidArgumentError, RequestTooLongError: as ``submit``; nothing was asked or computed.
        """
        params = one_each(sampling, len(prompts))
        entries = []
        try:
            for prompt, each in zip(prompts, params, strict=True):
                entries.append(self.submit(prompt, each))
            while self.has_unfinished:
                self.step()
        except BaseException:
            for entry in entries:
                self.cancel(entry)
            raise
        return entries

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is not over."""
        return bool(self._waiting or self._loads or self._computing)

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self) -> list[HandoffRequest]:
        """Ask, fetch, and compute one step; the requests that ended with it."""
        before = [*self._waiting, *(entry for entry, _ in (*self._loads.values(), *self._computing))]
        self._ask()
        moved = self._hear() | self._advance_loads()
        if self.engine.has_unfinished:
            self._step_engine()
        elif not moved and self._loads:
            self.link.wait(_PAUSE)
        self._tidy()
        return [entry for entry in before if entry.is_finished]

    def close(self) -> None:
        """Give everything back and say goodbye."""
        for entry in [*self._waiting, *(entry for entry, _ in (*self._loads.values(), *self._computing))]:
            self.cancel(entry)
        self.link.close()

    def _ask(self) -> None:
        """Begin loads, as far as there are rows for them."""
        while self._waiting:
            entry = self._waiting[0]
            if len(entry.request.prompt) <= self.manager.config.block_size:
                self._compute(self._waiting.pop(0), None)  # no block of it could be used
                continue
            if len(self._loads) + sum(load is not None for _, load in self._computing) >= self._num_places:
                return
            self._waiting.pop(0)
            load_id = next(self._numbers)
            try:
                load = BlockLoad(self.manager, self.link, load_id, entry.request.prompt, self._options, self._clock)
            except TransferError as error:
                self._failed(entry, error)
            else:
                self._loads[load_id] = entry, load

    def _hear(self) -> bool:
        try:
            messages = self.link.poll()
        except TransferError as error:
            self._fail_loads(error)
            return True
        for message in messages:
            self._deliver(message)
        return bool(messages)

    def _deliver(self, message: Message) -> None:
        if (found := self._loads.get(message.get("id", -1))) is not None:
            try:
                found[1].receive(message)
            except TransferError as error:
                self._end_load(message["id"], error)
            return
        with contextlib.suppress(TransferError):  # answers to a load that was given up
            if message["kind"] == "ready":
                self.link.send({"kind": "release", "lease": message["lease"]})
            elif message["kind"] == "staged":
                self.link.send({"kind": "unwanted", "uuid": message["uuid"]})

    def _advance_loads(self) -> bool:
        moved = False
        for load_id, (entry, load) in list(self._loads.items()):
            try:
                moved |= load.advance()
            except KVCacheError as error:
                self._end_load(load_id, TransferError(str(error)))
                moved = True
                continue
            if load.lacks_room and not self._others_make_room():
                self._end_load(load_id, TransferError("its blocks do not fit beside what is held"))
            elif load.is_done:
                entry.num_fetched, entry.num_present = load.num_fetched, load.num_present
                del self._loads[load_id]
                self._compute(entry, load)
        return moved

    def _others_make_room(self) -> bool:
        return self.engine.has_unfinished or any(load.is_under_way for _, load in self._loads.values())

    def _end_load(self, load_id: int, error: TransferError) -> None:
        entry, load = self._loads.pop(load_id)
        load.close()
        self._failed(entry, error)

    def _fail_loads(self, error: TransferError) -> None:
        for load_id in list(self._loads):
            self._end_load(load_id, error)

    def _failed(self, entry: HandoffRequest, error: TransferError) -> None:
        entry.transfer_error = error
        if self.on_failure == "fail":
            entry.failed = entry.is_finished = True
        else:
            self._compute(entry, None)

    def _compute(self, entry: HandoffRequest, load: BlockLoad | None) -> None:
        self.engine.add([entry.request])
        self._computing.append((entry, load))

    def _step_engine(self) -> None:
        try:
            self.engine.step()
        except OutOfBlocksError:
            if not self._make_room():
                self._give_up()
                raise
            return
        except BaseException:
            self._give_up()
            raise
        going_on = []
        for entry, load in self._computing:
            started = entry.request.num_computed > 0 or entry.request.finish_reason is not None
            if load is not None and started:
                load.close()  # the request holds its prefix itself
                load = None
            if all(one.finish_reason is not None for one in (entry.request, *entry.request.samples)):
                entry.is_finished = True
            else:
                going_on.append((entry, load))
        self._computing = going_on

    def _make_room(self) -> bool:
        """Let go of what is held for requests that have not begun; whether there was anything."""
        held = [load for _, load in self._computing if load is not None]
        self._computing = [(entry, None) for entry, _ in self._computing]
        for load in held:
            load.close()
        if held:
            return True
        under_way = [load_id for load_id, (_, load) in self._loads.items() if load.is_under_way]
        if under_way:
            self._end_load(under_way[-1], TransferError("its blocks were needed by requests that had begun"))
        return bool(under_way)

    def _give_up(self) -> None:
        """After a step that broke off: pages may be lost, and with them all that was fetched."""
        for entry in [*self._waiting, *(entry for entry, _ in (*self._loads.values(), *self._computing))]:
            self.cancel(entry)
            entry.failed = True
        self.engine.abort_all()

    def _tidy(self) -> None:
        if not self.engine.has_unfinished:
            self.engine.abort_all()  # what the last ones held comes back now, and not with a step that may never be
