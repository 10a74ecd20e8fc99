"""`rematree devices`: what can be planned for without having it."""

import dataclasses

from rematree.cli import options
from rematree.cli.output import emit_json, emit_table
from rematree.pricing.devices import known_devices
from rematree.report.devices import device_columns


def devices(as_json: options.Json = False) -> None:
    """List the devices that can be planned for: memory, rates, links. With --json also the source of each figure.

    FLOP rates are dense peaks, in 1e12 a second. A device that is not in the list can be measured where it is, with
    `rematree calibrate`.
    """
    known = known_devices()
    if as_json:
        emit_json([dataclasses.asdict(device) for device in known])
    else:
        emit_table(device_columns(known))
