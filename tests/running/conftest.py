"""Shared by tests of a run's files: event files as TensorBoard reads them."""

import struct

import pytest


def records(data):
    """The whole records: length (8 bytes), checksum of the length (4), the event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data):
            return
        event = Event()
        event.ParseFromString(data[start + 12 : end - 4])
        yield event
        start = end


@pytest.fixture(scope="session")
def events_of():
    """`events_of(folder)`: the events of all event files, in their order."""
    return lambda folder: [e for file in sorted(folder.iterdir()) for e in records(file.read_bytes())]


@pytest.fixture(scope="session")
def shown_scalars(events_of):
    """`shown_scalars(folder)`: (step, tag, value) of all event files, in their order.

    As TensorBoard has it, the start of a session at step N takes away what was written before from N on.
    """
    from tensorboardX.proto.event_pb2 import SessionLog

    def read(folder):
        shown = []
        for event in events_of(folder):
            if event.session_log.status == SessionLog.START:
                shown = [scalar for scalar in shown if scalar[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        return shown

    return read
