"""A scripted engine process for the tests: speaks the wire over its inherited socket, with tokens = f(prompt, seed, output index).

`--script FILE` names a JSON object: {"lives": [{...}, ...], "rest": {...}}. The n-th process plays the n-th life, those after the last play `rest`.
A life, all optional:
  load_seconds, load_deadline_seconds, heartbeat_seconds, deadline_seconds (of a step), fail [message, permanent], exit (at once)
  step_seconds (0.001), max_num_seqs (64), context_length (4096), announce (true: scheduled events go ahead of their step)
  after_tokens: k          what happens once k tokens were sent in this life: `then`
  poison: id               what happens when a prompt that starts with this id is in the batch: `then`; `poison_at`: outputs it then has
  then: kill, exit, hang (heartbeats go on), freeze (they stop), garbage, half_frame, close
  leave_child: true (a grandchild that holds on to stderr; its pid is written there), then_at_load: true (do `then` instead of Ready)
  reject: {first id: code}, no_eof (stays when the socket ends), stderr (text written at start), error_at: {first id: [output index, detail]}
Each Submit is appended to FILE.submits as JSON: [life, first id, number of outputs, alone].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from appliance.engine.wire import (
    Abort,
    Events,
    Failure,
    Finish,
    FrameReader,
    Heartbeat,
    Ready,
    Rejected,
    SequenceEvent,
    Start,
    StepOutput,
    Submit,
    ToEngine,
    TokenLogprobs,
    encode,
    pack_ids,
    unpack_ids,
)
from appliance.events import StepStats


def token_at(prompt_ids: list[int], seed: int, index: int) -> int:
    """The token at output `index`: depends on the prompt, the seed and the index alone."""
    state = (seed * 1_000_003 + index * 7_919 + sum((i + 1) * token for i, token in enumerate(prompt_ids))) & 0xFFFFFFFF
    state = (state ^ (state >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    return (state ^ (state >> 12)) % 30_000


def expected_tokens(prompt_ids: list[int], seed: int, num_tokens: int) -> list[int]:
    """What an engine that never crashes would generate."""
    return [token_at(prompt_ids, seed, index) for index in range(num_tokens)]


@dataclasses.dataclass
class Row:
    """One sequence in the fake's batch or queue."""

    submit: Submit
    prompt_ids: list[int]
    num_outputs: int


class FakeEngine:
    """Steps over all its rows, one token each, as the script says."""

    def __init__(self, sock: socket.socket, life: dict[str, Any], number: int, submits: Path) -> None:
        self.sock, self.life, self.number, self.submits = sock, life, number, submits
        self.reader = FrameReader(ToEngine)
        self.lock = threading.Lock()
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        self.finished: list[tuple[int, str, str]] = []
        self.num_sent = self.num_steps = 0
        self.phase, self.phase_started_at = "load", time.monotonic()
        self.deadline_seconds = 30.0
        self.beating = True

    def send(self, message: Any) -> None:
        """One frame, whole; leave like the real one if nobody reads it."""
        try:
            with self.lock:
                self.sock.sendall(encode(message))
        except OSError:
            self.leave()

    def leave(self) -> None:
        """The socket has ended."""
        if self.life.get("no_eof"):
            time.sleep(60)
        os._exit(0)

    def tell(self) -> None:
        """One heartbeat."""
        self.send(Heartbeat(self.phase, self.phase_started_at, self.deadline_seconds, 0.5))

    def beat(self) -> None:
        """The heartbeat thread."""
        while True:
            if self.beating:
                self.tell()
            time.sleep(self.life.get("heartbeat_seconds", 0.1))

    def enter(self, phase: str) -> None:
        """Begin a phase; say so if it is another one."""
        changed = phase != self.phase
        self.phase, self.phase_started_at = phase, time.monotonic()
        if changed:
            self.tell()

    def die(self) -> None:
        """Do what `then` says."""
        then = self.life.get("then", "kill")
        if then == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if then == "exit":
            print("RuntimeError: CUDA error: an illegal memory access", file=sys.stderr, flush=True)
            os._exit(3)
        if then == "garbage":
            with self.lock:
                self.sock.sendall(b"\x05\x00\x00\x00hello")
        if then == "half_frame":
            with self.lock:
                self.sock.sendall(encode(Failure("never complete", False))[:-3])
            os.kill(os.getpid(), signal.SIGKILL)
        if then == "close":
            self.sock.shutdown(socket.SHUT_RDWR)
        if then == "freeze":
            self.beating = False
        time.sleep(60)

    def receive(self, timeout: float) -> None:
        """Take what has arrived within `timeout`."""
        if not select.select([self.sock], [], [], timeout)[0]:
            return
        data = self.sock.recv(1 << 16)
        if not data:
            self.leave()
        for message in self.reader.feed(data):
            if isinstance(message, Submit):
                self.submit(message)
            elif isinstance(message, Abort | Finish):
                reason = "abort" if isinstance(message, Abort) else "finish"
                for rows in (self.waiting, self.running):
                    for row in [row for row in rows if row.submit.sequence_id == message.sequence_id]:
                        rows.remove(row)
                        self.finished.append((message.sequence_id, reason, ""))

    def submit(self, message: Submit) -> None:
        """Queue or reject."""
        row = Row(message, unpack_ids(message.prompt_ids), len(message.output_ids) // 4)
        sampling = message.sampling
        outputs = unpack_ids(message.output_ids)
        if outputs != expected_tokens(row.prompt_ids, sampling.seed, len(outputs)) or len(outputs) >= sampling.max_tokens:
            self.send(Failure(f"resumed with the wrong outputs: {outputs}", True))
            os._exit(9)
        with self.submits.open("a") as file:
            file.write(json.dumps([self.number, row.prompt_ids[0], row.num_outputs, message.alone]) + "\n")
        if code := self.life.get("reject", {}).get(str(row.prompt_ids[0])):
            self.send(Rejected(message.sequence_id, code, f"rejected: {code}"))
        else:
            self.waiting.append(row)

    def schedule(self) -> list[SequenceEvent]:
        """Fill the batch from the queue; a row that must be alone waits for an empty batch, and keeps it."""
        events = []
        now = time.monotonic()
        while self.waiting and len(self.running) < self.life.get("max_num_seqs", 64):
            if self.running and (self.waiting[0].submit.alone or self.running[0].submit.alone):
                break
            row = self.waiting.pop(0)
            self.running.append(row)
            events.append(SequenceEvent(row.submit.sequence_id, "scheduled", now, 3))
        return events

    def step(self) -> None:
        """One token for each row."""
        started_at = time.monotonic()
        self.enter("step")
        events = self.schedule()
        if events and self.life.get("announce", True):
            self.send(Events(tuple(events)))
            events = []
        time.sleep(self.life.get("step_seconds", 0.001))
        for row in self.running:
            if row.prompt_ids[0] == self.life.get("poison") and row.num_outputs >= self.life.get("poison_at", 0):
                self.die()
        if "after_tokens" in self.life and self.num_sent >= self.life["after_tokens"]:
            self.die()
        ids, tokens, logprobs = [], [], {}
        for row in list(self.running):
            sequence_id, sampling = row.submit.sequence_id, row.submit.sampling
            error_at = self.life.get("error_at", {}).get(str(row.prompt_ids[0]))
            if error_at and row.num_outputs == error_at[0]:
                self.running.remove(row)
                self.finished.append((sequence_id, "error", error_at[1]))
                continue
            token = token_at(row.prompt_ids, sampling.seed, row.num_outputs)
            ids.append(sequence_id)
            tokens.append(token)
            row.num_outputs += 1
            if row.num_outputs == 1:
                events.append(SequenceEvent(sequence_id, "prefilled", time.monotonic(), len(row.prompt_ids)))
            if sampling.num_logprobs is not None:
                logprobs[sequence_id] = TokenLogprobs(-float(row.num_outputs), 1, (token,), (-1.0,))
            reason = "length" if row.num_outputs >= sampling.max_tokens else "stop" if token in sampling.stop_token_ids else None
            if row.submit.deadline_at is not None and time.monotonic() > row.submit.deadline_at:
                reason = "deadline"
            if reason:
                self.running.remove(row)
                self.finished.append((sequence_id, reason, ""))
        self.num_sent += len(ids)
        self.num_steps += 1
        finished, self.finished = tuple(self.finished), []
        output = StepOutput(
            stats=self.stats(started_at, len(ids)),
            sequence_ids=pack_ids(ids),
            token_ids=pack_ids(tokens),
            finished=finished,
            events=tuple(events),
            logprobs=logprobs or None,
        )
        self.send(output)

    def stats(self, started_at: float, num_tokens: int) -> StepStats:
        """Plausible numbers."""
        zeros = {**dict.fromkeys(StepStats.__struct_fields__, 0), "chunks": (), "block_ends": None}
        fields = {"step": self.num_steps, "started_at": started_at, "num_decode_tokens": num_tokens, "num_running": len(self.running)}
        return StepStats(**{**zeros, **fields, "num_waiting": len(self.waiting), "graph_hit": False})  # type: ignore[arg-type]

    def load(self) -> None:
        """Wait for Start, then do what the script says a load does."""
        messages: list[object] = []
        while not messages:
            if not (data := self.sock.recv(1 << 16)):
                self.leave()
            messages = self.reader.feed(data)
        if not isinstance(messages[0], Start):
            self.send(Failure("the first frame is no Start", True))
            os._exit(8)
        self.deadline_seconds = self.life.get("load_deadline_seconds", 30.0)
        threading.Thread(target=self.beat, daemon=True).start()
        time.sleep(self.life.get("load_seconds", 0.0))
        if "fail" in self.life:
            message, permanent = self.life["fail"]
            self.send(Failure(message, permanent))
            os._exit(1)
        if self.life.get("then_at_load"):
            self.die()
        self.deadline_seconds = self.life.get("deadline_seconds", 30.0)
        self.enter("idle")
        self.send(
            Ready(
                device="fake",
                dtype="float32",
                quantization="none",
                vocab_size=30_000,
                context_length=self.life.get("context_length", 4096),
                max_num_seqs=self.life.get("max_num_seqs", 64),
                max_num_batched_tokens=512,
                block_size=16,
                num_blocks=1024,
                num_parameters=1,
                weight_bytes=4,
                kv_bytes_per_token=1,
                load_seconds=self.life.get("load_seconds", 0.0),
                reasons=(),
            )
        )

    def run(self) -> None:
        """Load, then step while there is work."""
        self.load()
        while True:
            if self.running or self.waiting or self.finished:
                self.receive(0)
                self.step()
            else:
                self.enter("idle")
                self.receive(60.0)


def main() -> None:
    """Read the script, find out which life this is, play it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    script = json.loads(arguments.script.read_text())
    counter = arguments.script.with_suffix(".lives")
    with counter.open("a") as file:
        file.write(f"{os.getpid()}\n")
    number = len(counter.read_text().splitlines()) - 1
    lives = script.get("lives", [])
    life = lives[number] if number < len(lives) else script.get("rest", {})
    if "stderr" in life:
        print(life["stderr"], file=sys.stderr, flush=True)
    if life.get("leave_child"):
        grandchild = subprocess.Popen(["sleep", "60"])
        print(grandchild.pid, file=sys.stderr, flush=True)
    if "exit" in life:
        os._exit(life["exit"])
    submits = arguments.script.with_suffix(".submits")
    FakeEngine(socket.socket(fileno=arguments.fd), life, number, submits).run()


if __name__ == "__main__":
    main()
