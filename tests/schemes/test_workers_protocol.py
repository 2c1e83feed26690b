"""Messages and shared memory, without workers."""

from __future__ import annotations

import gc
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import WorkerError
from graphopt.schemes.workers.mirror import Mirror, Shelf
from graphopt.schemes.workers.protocol import VERSION, Channel
from graphopt.schemes.workers.shared_memory import ALIGNMENT, Parcel, Segment, place_end, place_of


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    both = [Channel(end) for end in socket.socketpair()]
    yield both[0], both[1]
    for channel in both:
        channel.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_arrive_whole_and_in_order(ends: tuple[Channel, Channel]) -> None:
    messages = [{"n": 1}, {"long": "x" * 1_000_000}, {"floats": [0.1, float("inf"), -0.0]}]
    sender = threading.Thread(target=lambda: [ends[0].send(m) for m in messages])
    sender.start()
    assert [ends[1].receive()[0] for _ in messages] == messages
    sender.join()


def test_files_come_with_their_message(ends: tuple[Channel, Channel]) -> None:
    before = open_files()
    segments = [Segment.new(100), Segment.new(200)]
    for number, segment in enumerate(segments):
        segment.data.fill_(number + 1)
    ends[0].send({"first": 1})
    ends[0].send({"second": "x" * 300_00}, [s.file for s in segments])
    for segment in segments:
        segment.release()
    assert ends[1].receive() == ({"first": 1}, [])
    _, files = ends[1].receive()
    received = [Segment.received(file) for file in files]
    assert [int(s.data[0]) for s in received] == [1, 2]
    received[0].data[0] = 9
    assert int(segments[0].data[0]) == 9
    assert open_files() - before <= 4  # mappings keep a descriptor of their own each
    del segments, received, segment
    gc.collect()
    assert open_files() == before


def test_the_end_of_a_connection(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError, match="no message within"):
        ends[1].receive(0.01)
    ends[0].socket.sendall(b"\x01")
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()


def test_another_version_is_named(ends: tuple[Channel, Channel]) -> None:
    text = json.dumps({}).encode()
    ends[0].socket.sendall(struct.pack("!BI", VERSION + 1, len(text)) + text)
    with pytest.raises(WorkerError, match="of the protocol, this process"):
        ends[1].receive()


shapes = st.lists(st.integers(0, 4), max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.complex64])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any shape, dtype and strides: transposed, with gaps, with a broadcast dimension."""
    tensor = torch.randint(0, 2, draw(shapes)).to(draw(dtypes))
    tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[..., ::2]
    return tensor.expand(3, *tensor.shape) if draw(st.booleans()) else tensor


@given(st.lists(tensors(), max_size=5))
def test_tensors_lie_side_by_side_in_a_parcel(given_tensors: list[torch.Tensor]) -> None:
    places, segment = Parcel().pack(given_tensors)
    assert segment is not None
    for tensor, place in zip(given_tensors, places, strict=True):
        view = segment.view(place)
        assert view.dtype == tensor.dtype and torch.equal(view, tensor)
        assert place[0] % ALIGNMENT == 0
        dense = sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride())) + 1 == tensor.numel()
        assert view.stride() == tensor.stride() if dense else view.is_contiguous()
    for place, after in pairwise(places):
        assert place_end(place) <= after[0]
    segment.release()


def test_a_parcel_grows_when_it_must_only() -> None:
    parcel = Parcel()
    rows = [parcel.pack([torch.zeros(n, 1024)])[1] is not None for n in (1, 1, 100, 50, 101, 120, 1000)]
    assert rows == [True, False, True, False, False, False, True]


def test_a_tensor_has_one_home_and_memory_of_the_dead_is_used_again() -> None:
    mirror = Mirror()
    one, other = torch.randn(3, 5), torch.randn(2_000_000)
    homes = [mirror.home(t) for t in (one, other, one)]
    assert homes[0] is homes[2] is not homes[1]
    described, segments = mirror.news()
    assert [(number, place[0]) for number, _, place in described] == [(0, 0), (1, 0)] and len(segments) == 2
    assert mirror.news() == ([], [])
    place = homes[0].place
    del one, homes
    again = mirror.home(torch.randn(5, 3))
    assert again.place[0] == place[0] and mirror.news()[1] == []


def test_a_shelf_copies_what_changed() -> None:
    trained, frozen, small = torch.zeros(5000), torch.zeros(5000), torch.zeros(3)
    mirror = Mirror()
    shelf = Shelf(mirror, [True, False, False])
    tensors = [trained, frozen, small]
    assert shelf.refresh(tensors) and not shelf.refresh(tensors)
    copies = [mirror.home(t).view for t in tensors]
    copies[1][1] = 7  # between samples: a copy would overwrite it
    shelf.refresh(tensors)
    assert copies[1][1] == 7
    for number, write in enumerate((lambda t: t.data.add_(1), lambda t: t[1:2].add_(2), lambda t: t.fill_(3))):
        for tensor in tensors:
            write(tensor)
        assert not shelf.refresh(tensors), number
        assert all(torch.equal(c, t) for c, t in zip(copies, tensors, strict=True)), number
    trained.data[1] = small.data[1] = 11  # not counted and between samples
    shelf.refresh(tensors)
    assert copies[0][1] == copies[2][1] == 11
    assert shelf.refresh([trained, frozen.clone(), small])


def test_place_of_an_empty_tensor() -> None:
    assert place_end(place_of(torch.empty(0, 3), 0)) == 0
