"""Every field of every request of the contract, found in its descriptors, at the ends of its type and beyond."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, TypeAlias

import grpc
from google.protobuf import duration_pb2, struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.served_worker import (
    Refusal,
    ServedWorker,
    generate_request,
    read_until,
    reasons,
    serve_script,
)

Path: TypeAlias = tuple[FieldDescriptor, ...]
MODULES = (pb, duration_pb2, struct_pb2)
SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]
CODE = grpc.StatusCode

# Messages that mean nothing when empty, so that what is wrong with a field of theirs is the first thing to be found.
FINE: dict[str, Message] = {
    message.DESCRIPTOR.full_name: message
    for message in (
        generate_request(caller=pb.Caller(key_id="k")),
        pb.Caller(key_id="k"),
        pb.Prompt(text="Hi"),
        pb.TokenIds(ids=[5]),
        pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]),
        pb.ChatMessage(role="assistant", content="Hi"),
        pb.ToolCall(name="f", arguments="{}"),
        pb.Tool(name="f"),
        pb.Stopping(max_tokens=4),
        pb.Resume(resume_id=f"rs_{'0' * 48}"),
        pb.Constraint(regex="a+"),
        pb.ChoiceList(texts=["a"]),
        pb.TokenizeRequest(prompt=pb.Prompt(text="Hi")),
        pb.DetokenizeRequest(token_ids=[5]),
        pb.AbortRequest(request_id="nobody"),
        duration_pb2.Duration(seconds=60),
        struct_pb2.Value(number_value=1),
    )
}
DURATIONS = [
    (seconds, nanos)
    for seconds in (-(2**63), -315_576_000_001, -1, 0, 1, 315_576_000_000, 2**63 - 1)
    for nanos in (-(2**31), -(10**9), -1, 0, 1, 10**9 - 1, 10**9, 2**31 - 1)
]
FLOATS = [float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, -1e-45, -0.0]
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), -1, 0, 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), -1, 0, 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), -1, 99, 2**31 - 1),
}
# What a request may end with for what stands in it; UNKNOWN and INTERNAL would be our own fault.
ANSWERS = {
    *(CODE.OK, CODE.INVALID_ARGUMENT, CODE.NOT_FOUND),
    *(CODE.RESOURCE_EXHAUSTED, CODE.DEADLINE_EXCEEDED),  # where it is a time
}


def fine(descriptor: Descriptor) -> Message:
    """A message of this type that is refused for nothing."""
    module: Any = next(m for m in MODULES if m.DESCRIPTOR.name == descriptor.file.name)
    made: Message = getattr(module, descriptor.name)()
    if (example := FINE.get(descriptor.full_name)) is not None:
        made.CopyFrom(example)
    return made


def paths(descriptor: Descriptor, before: Path = ()) -> Iterator[Path]:
    """The paths of all fields, messages and what is in them alike; none twice through the same type."""
    for field in descriptor.fields:
        path = (*before, field)
        yield path
        inner = field.message_type
        if inner is None or inner in [part.containing_type for part in path]:
            continue
        if not inner.GetOptions().map_entry and inner.full_name != "google.protobuf.Struct":
            yield from paths(inner, path)


def is_message(path: Path) -> bool:
    kind = path[-1].message_type
    return kind is not None and not kind.GetOptions().map_entry


def is_list(field: FieldDescriptor) -> bool:
    assert field.containing_type is not None
    return hasattr(getattr(fine(field.containing_type), field.name), "extend")


def place(path: Path, kind: Descriptor) -> tuple[Message, Message]:
    """A request that is fine, and the message in it whose field the path ends with."""
    request = holder = fine(kind)
    if path[0].name == "resume":
        request.Clear()
    if path[0].name == "resume_tag" or path[0].name == "annotation":
        request.resume_window.seconds = 60  # type: ignore[attr-defined]
    if path[0].name == "continuation":
        request.sampling.temperature = 0  # type: ignore[attr-defined]
    for field in path[:-1]:
        assert field.message_type is not None
        value = getattr(holder, field.name)
        if is_list(field):
            del value[:]
            holder = value.add()
            holder.CopyFrom(fine(field.message_type))
        else:
            value.CopyFrom(fine(field.message_type))
            value.SetInParent()
            holder = value
    return request, holder


def name_of(path: Path) -> str:
    return ".".join(f"{part.name}[0]" if is_list(part) else part.name for part in path)


def extremes(field: FieldDescriptor, holder: Message) -> Iterator[Any]:
    """Sets the field to one extreme after the other, and tells what it is."""
    if field.message_type is not None:
        if field.message_type.full_name == "google.protobuf.Duration":
            for seconds, nanos in DURATIONS:
                duration = duration_pb2.Duration(seconds=seconds, nanos=nanos)
                getattr(holder, field.name).CopyFrom(duration)
                yield (seconds, nanos)
        elif field.name == "logit_bias":
            for value in FLOATS:
                getattr(holder, field.name)[5] = value
                yield value
        return
    floats = field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
    number: float
    for number in FLOATS if floats else INTEGERS.get(field.cpp_type, ()):
        if is_list(field):
            del getattr(holder, field.name)[:]
            getattr(holder, field.name).append(number)
        else:
            setattr(holder, field.name, number)
        yield number


async def ask(worker: ServedWorker, method: str, request: Message) -> Refusal | None:
    """Makes the call; how it was refused, if it was."""
    call = getattr(worker.stub, method)(request, timeout=PATIENCE)
    try:
        if method == "Generate":
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return Refusal(error)
    return None


METHODS = [(method.name, method.input_type) for method in SERVICE.methods]


async def test_no_number_and_no_duration_is_too_extreme_to_be_named() -> None:
    async with serve_script(step_milliseconds=2) as worker:
        witness = worker.stub.Generate(generate_request(max_tokens=4000, request_id="witness"))
        await read_until(witness, "delta")
        reading = asyncio.ensure_future(read_until(witness, "finished"))
        tried = 0
        for method, kind in METHODS:
            for path in paths(kind):
                if path[0].name == "request_id" and len(path) == 1:
                    continue
                request, holder = place(path, kind)
                for value in extremes(path[-1], holder):
                    tried += 1
                    refusal = await ask(worker, method, request)
                    if refusal is None:
                        continue
                    case = (method, name_of(path), value, refusal.code, refusal.message)
                    assert refusal.code in ANSWERS, case
                    if refusal.code is CODE.INVALID_ARGUMENT:
                        is_inexact = (
                            path[-1].cpp_type in INTEGERS
                        )  # may be wrong only beside others
                        wanted = (
                            name_of(path[:1]).partition("[")[0] if is_inexact else name_of(path)
                        )
                        assert refusal.field.startswith(wanted), case
                        assert refusal.field in refusal.message, case
        assert tried > 200
        await worker.stub.Abort(pb.AbortRequest(request_id="witness"))
        streamed = await reading
        assert any(message.delta.text for message in streamed), "another stream went on meanwhile"
        assert reasons(streamed)[0] in ("CANCELLED", "LENGTH")


async def test_no_message_ignores_a_field_that_it_does_not_know() -> None:
    async with serve_script() as worker:
        checked = []
        for method, kind in METHODS:
            for path in ((), *filter(is_message, paths(kind))):
                request = holder = fine(kind)
                if path:
                    request, holder = place((*path, path[-1]), kind)
                holder.MergeFromString(b"\x98\x06\x01")  # field 99, the number 1
                refusal = await ask(worker, method, request)
                name = f"{name_of(path)}.99" if path else "99"
                assert refusal is not None, (method, name)
                assert (refusal.code, refusal.field) == (CODE.UNIMPLEMENTED, name), (
                    method,
                    refusal.message,
                )
                checked.append(name)
        assert {"99", "resume_window.99", "timeout.99", "caller.99"} <= set(checked)
