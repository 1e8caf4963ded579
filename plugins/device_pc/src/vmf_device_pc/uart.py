"""The 16550A serial port (National Semiconductor PC16550D data sheet), COM1 at 0x3F8, interrupt 4.

Theory of operation
    The transmitter is always empty. Received bytes wait in a bounded queue; what does not fit stays with the caller.

    Input comes in bursts. Within a burst the line is infinitely fast: a byte that the guest takes from the FIFO is
    replaced at once. Then the line is silent for `PAUSE_SHARE` times as long as the guest took to read the burst. So
    the interrupt falls between bursts, as it does on a line with a baud rate, and receiving takes a bounded share of
    the guest's time, on slow engines too. Without pauses an interrupt handler that reads until nothing is there never
    ends: Linux leaves it after 512 passes, and an edge-triggered controller then sees no other edge.
    A guest that stops reading in the middle of a burst gets a new edge after `STALL_NS`, as from the chip's character
    timeout: no way of handling the interrupt leaves the port dead.

    Flow control: RTS low while DTR is high stops the line (Linux with CRTSCTS, and its console before the port is
    opened). With both low the guest may not use them at all (EDK2 and xv6 set MCR to 0 and read), so the line
    is on.
    What a guest throws away by clearing the FIFO before it enables the receive interrupt returns to the queue, and the
    line is silent until the driver listens (`OPENING_NS` at most): what was typed before the port was opened is not
    lost.

    Output is gathered and passed on at the end of a line, when `OUTPUT_LIMIT` bytes are there, `OUTPUT_DELAY_NS`
    after the first byte, and whenever the machine pauses: a prompt without a newline is seen within half a
    millisecond, and the host is not asked for every single byte.

    Interrupts: receive data (FIFO at its trigger level), character timeout (anything less: no more follows in this
    burst), transmitter empty (raised when the guest enables it or has written, lowered when it reads
    IIR), modem status. As every write to THR empties at once, writing lowers and raises the line again: an edge.

    IRQ is not gated by MCR.OUT2, as on other virtual 16550s.
"""

from __future__ import annotations

from attrs import evolve

from vmf.device import fields
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.device.interrupts import IrqLine
from vmf.errors import StateError
from vmf_device_pc.ports import Port

COM1_PORT = 0x3F8
COM1_IRQ = 4

FIFO_SIZE = 16
QUEUE_SIZE = 4096
"""Bytes on their way to the guest."""
BURST_SIZE = 128
PAUSE_SHARE = 3
PAUSE_MIN_NS, PAUSE_MAX_NS = 100_000, 5_000_000
STALL_NS = 5_000_000
OPENING_NS = 100_000_000
OUTPUT_LIMIT = 512
NEWLINE = 0x0A
OUTPUT_DELAY_NS = 500_000

IER_RECEIVE, IER_TRANSMIT, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_TRANSMIT, IIR_RECEIVE, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x0C
IIR_FIFO = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVE = 0x01, 0x02
_FCR_KEPT = 0xC9  # trigger level, DMA mode, enable; the others act once
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 16
LSR_DATA, LSR_TRANSMITTER_EMPTY = 0x01, 0x60
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD
_LINE_OFF = frozenset({MCR_DTR} | {MCR_LOOP | others for others in (0, MCR_DTR, MCR_RTS, MCR_DTR | MCR_RTS)})
_ADDED_TO_VERSION_1 = {
    **dict.fromkeys(("burst", "burst_began", "silent_until", "opening_until", "receive_deadline"), 0),
    **dict.fromkeys(("read_lately", "looped"), False),
}
_TRIGGER_LEVELS = (1, 4, 8, 14)


class Uart16550(Device):
    """One serial port."""

    kind = "pc.uart16550"
    writes_ram = False
    VERSION = 2
    SCHEMA: fields.Schema = {
        "ier": fields.integer(0, 0x0F),
        "fcr": fields.BYTE,
        "lcr": fields.BYTE,
        "mcr": fields.integer(0, 0x1F),
        "scratch": fields.BYTE,
        "divisor": fields.integer(0, 0xFFFF),
        "modem_delta": fields.integer(0, 0x0F),
        "transmit_pending": fields.boolean,
        "fifo": fields.octets(0, FIFO_SIZE),
        "queue": fields.octets(0, QUEUE_SIZE),
        "burst": fields.integer(0, BURST_SIZE),
        "burst_began": fields.TIME,
        "silent_until": fields.TIME,
        "opening_until": fields.TIME,
        "receive_deadline": fields.optional(fields.TIME),
        "read_lately": fields.boolean,
        "looped": fields.boolean,
    }

    def __init__(self, environment: DeviceEnvironment, base: int = COM1_PORT, irq: int = COM1_IRQ) -> None:
        self._irq: IrqLine = environment.irq_line(irq)
        self._irq_level = False
        self._emit = environment.serial_output
        self._clock = environment.clock
        self._flush_timer = environment.timers.timer(self.flush)
        self._receive_timer = environment.timers.timer(self._receive_due)
        self._output = bytearray()
        self._fifo = bytearray()
        """The receive FIFO, and behind its `_capacity` the rest of the burst."""
        self._queue = bytearray()
        self._power_on()
        for offset, (read, write) in enumerate(
            (
                (self._read_data, self._write_data),
                (self._read_ier, self._write_ier),
                (self._read_iir, self._write_fcr),
                (self._read_lcr, self._write_lcr),
                (self._read_mcr, self._write_mcr),
                (self._read_lsr, self._write_status),
                (self._read_msr, self._write_status),
                (self._read_scratch, self._write_scratch),
            )
        ):
            environment.bus.claim_ports(self.kind, base + offset, 1, Port(read, write))

    def _power_on(self) -> None:
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._scratch = 0
        self._divisor = 12  # 9600 baud, as firmware leaves it
        self._modem_delta = 0
        self._transmit_pending = False
        self._lsr = LSR_TRANSMITTER_EMPTY
        # Writing THR needs the slow path in any of three modes: DLAB, loopback, transmitter interrupt enabled.
        self._plain_output = True
        self._fifo.clear()
        self._queue.clear()
        self._burst_began = 0
        self._silent_until = 0
        self._opening_until = 0
        self._read_lately = False
        self._looped = False

    # -- output

    def _write_data(self, _offset: int, _size: int, value: int) -> None:
        if self._plain_output:
            output = self._output
            output.append(value & 0xFF)
            if value == NEWLINE or len(output) >= OUTPUT_LIMIT:
                self._emit(bytes(output))
                output.clear()
            elif self._flush_timer.deadline is None:
                self._flush_timer.arm(self._clock.now() + OUTPUT_DELAY_NS)
            return
        value &= 0xFF
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value
            return
        if not self._mcr & MCR_LOOP:
            self._send(value)
        elif len(self._fifo) < self._capacity:
            self._fifo.append(value)
            self._looped = True
            self._lsr |= LSR_DATA
        # The write ends the transmitter's request, and the byte being gone at once begins the next: a falling and a
        # rising edge, unless another cause holds the line up. A guest that answers by writing only needs that edge.
        if self._irq_level and self._transmit_pending and self._identity() == IIR_TRANSMIT:
            self._irq.set_level(False)
            self._irq.set_level(True)
        else:
            self._transmit_pending = True
            self._update()

    def _send(self, value: int) -> None:
        self._output.append(value)
        if value == NEWLINE or len(self._output) >= OUTPUT_LIMIT:
            self.flush()
        elif self._flush_timer.deadline is None:
            self._flush_timer.arm(self._clock.now() + OUTPUT_DELAY_NS)

    def flush(self) -> None:
        """Pass on what was gathered."""
        if self._output:
            self._emit(bytes(self._output))
            self._output.clear()

    # -- input

    @property
    def _capacity(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    @property
    def _line_on(self) -> bool:
        """Whether bytes reach the FIFO: not in loopback, nor while the guest holds the sender off."""
        return self._mcr & (MCR_LOOP | MCR_DTR | MCR_RTS) not in _LINE_OFF

    def serial_input(self, data: bytes) -> int:
        """Take as many bytes as there is room for."""
        accepted = data[: QUEUE_SIZE - len(self._queue) - len(self._fifo)]
        if accepted:
            self._queue += accepted
            self._load(self._capacity - len(self._fifo) if self._fifo else BURST_SIZE)
        return len(accepted)

    def _load(self, room: int = BURST_SIZE) -> None:
        """Begin a burst, or add to the present one, unless the line has to be silent."""
        if not self._queue or room <= 0 or not self._line_on:
            return
        now = self._clock.now()
        silent_until = max(self._silent_until, self._opening_until)
        if now < silent_until:
            self._receive_timer.arm(silent_until)
            return
        if not self._fifo:
            self._burst_began = now
        self._fifo += self._queue[:room]
        del self._queue[:room]
        self._lsr |= LSR_DATA
        self._update()

    def _receive_due(self) -> None:
        if not self._fifo:
            self._load()
        elif self._read_lately:
            self._read_lately = False
            self._receive_timer.arm(self._clock.now() + STALL_NS)
        elif self._irq_level and self._ier & IER_RECEIVE:
            self._irq.set_level(False)
            self._irq.set_level(True)

    def _read_data(self, _offset: int, _size: int) -> int:
        if self._lcr & LCR_DLAB:
            return self._divisor & 0xFF
        fifo = self._fifo
        if not fifo:
            return 0
        value = fifo.pop(0)
        if fifo:
            self._read_lately = True
            if self._receive_timer.deadline is None:
                self._receive_timer.arm(self._clock.now() + STALL_NS)
            return value
        self._lsr &= ~LSR_DATA
        if self._looped:
            self._looped = False
        else:
            now = self._clock.now()
            pause = PAUSE_SHARE * (now - self._burst_began)
            self._silent_until = now + min(max(pause, PAUSE_MIN_NS), PAUSE_MAX_NS)
            self._load()
        self._update()
        return value

    def _return(self, kept: int) -> None:
        """What is in the FIFO beyond `kept` bytes has not been sent yet."""
        self._queue[:0] = self._fifo[kept:]
        del self._fifo[kept:]

    def _clear_receive(self, *, discard: bool) -> None:
        """Empty the FIFO. What is not to be discarded has not been sent yet."""
        if not self._looped:
            self._return(self._capacity if discard else 0)
        self._fifo.clear()
        self._looped = False
        self._lsr &= ~LSR_DATA
        if not self._ier & IER_RECEIVE:
            self._opening_until = self._clock.now() + OPENING_NS

    def _opened(self) -> None:
        """The driver is ready to receive."""
        self._opening_until = 0
        if not self._fifo:
            self._load()

    # -- registers

    def _read_lsr(self, _offset: int, _size: int) -> int:
        return self._lsr

    def _write_status(self, _offset: int, _size: int, _value: int) -> None:
        """LSR and MSR are read-only in normal operation."""

    def _read_ier(self, _offset: int, _size: int) -> int:
        return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier

    def _write_ier(self, _offset: int, _size: int, value: int) -> None:
        value &= 0xFF
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0x00FF | value << 8
            return
        value &= 0x0F
        if value & IER_TRANSMIT and not self._ier & IER_TRANSMIT:
            self._transmit_pending = True  # the transmitter is empty, and says so to whoever starts to listen
        began_to_listen = value & IER_RECEIVE and not self._ier & IER_RECEIVE
        self._ier = value
        self._mode_changed()
        if began_to_listen:
            self._opened()

    def _read_iir(self, _offset: int, _size: int) -> int:
        identity = self._identity()
        if identity == IIR_TRANSMIT:
            self._transmit_pending = False
            self._update()
        return identity | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)

    def _write_fcr(self, _offset: int, _size: int, value: int) -> None:
        value &= 0xFF
        if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RECEIVE:
            # Changing the mode empties it, too, but is no request to forget what came.
            self._clear_receive(discard=bool(value & FCR_CLEAR_RECEIVE and self._ier & IER_RECEIVE))
        self._fcr = value & _FCR_KEPT if value & FCR_ENABLE else 0
        self._load(0 if self._fifo else BURST_SIZE)
        self._update()

    def _read_lcr(self, _offset: int, _size: int) -> int:
        return self._lcr

    def _write_lcr(self, _offset: int, _size: int, value: int) -> None:
        self._lcr = value & 0xFF
        self._mode_changed()

    def _read_mcr(self, _offset: int, _size: int) -> int:
        return self._mcr

    def _write_mcr(self, _offset: int, _size: int, value: int) -> None:
        before, rts_before = self._modem_lines(), self._mcr & MCR_RTS
        self._mcr = value & 0x1F
        changed = before ^ self._modem_lines()
        self._modem_delta |= changed >> 4 & 0x0B
        if changed & before & MSR_RI:  # the ring indicator's delta marks its trailing edge
            self._modem_delta |= 0x04
        self._mode_changed()
        if not self._line_on:
            if not self._looped:
                self._return(self._capacity)
        elif value & MCR_RTS and not rts_before:
            self._opened()
        elif not self._fifo:
            self._load()

    def _modem_lines(self) -> int:
        mcr = self._mcr
        if not mcr & MCR_LOOP:
            return MSR_CONNECTED
        return (
            (MSR_DSR if mcr & MCR_DTR else 0)
            | (MSR_CTS if mcr & MCR_RTS else 0)
            | (MSR_RI if mcr & MCR_OUT1 else 0)
            | (MSR_DCD if mcr & MCR_OUT2 else 0)
        )

    def _read_msr(self, _offset: int, _size: int) -> int:
        value = self._modem_lines() | self._modem_delta
        if self._modem_delta:
            self._modem_delta = 0
            self._update()
        return value

    def _read_scratch(self, _offset: int, _size: int) -> int:
        return self._scratch

    def _write_scratch(self, _offset: int, _size: int, value: int) -> None:
        self._scratch = value & 0xFF

    # -- interrupts

    def _mode_changed(self) -> None:
        self._plain_output = not (self._lcr & LCR_DLAB or self._mcr & MCR_LOOP or self._ier & IER_TRANSMIT)
        self._update()

    def _identity(self) -> int:
        """IIR without the FIFO bits: the most urgent enabled cause."""
        ier = self._ier
        if ier & IER_RECEIVE and self._fifo:
            if self._fcr & FCR_ENABLE and len(self._fifo) < _TRIGGER_LEVELS[self._fcr >> 6]:
                return IIR_TIMEOUT
            return IIR_RECEIVE
        if ier & IER_TRANSMIT and self._transmit_pending:
            return IIR_TRANSMIT
        if ier & IER_MODEM and self._modem_delta:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        level = self._identity() != IIR_NONE
        if level != self._irq_level:
            self._irq_level = level
            self._irq.set_level(level)

    # -- life

    def _stop(self) -> None:
        self.flush()
        self._flush_timer.cancel()
        self._receive_timer.cancel()

    def quiesce(self) -> None:
        self.flush()

    def reset(self) -> None:
        self._stop()
        self._power_on()
        self._update()

    def save(self) -> Payload:
        self.flush()
        capacity = self._capacity
        return Payload(
            self.kind,
            self.VERSION,
            {
                "ier": self._ier,
                "fcr": self._fcr,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "scratch": self._scratch,
                "divisor": self._divisor,
                "modem_delta": self._modem_delta,
                "transmit_pending": self._transmit_pending,
                "fifo": bytes(self._fifo[:capacity]),
                "queue": bytes(self._fifo[capacity:] + self._queue),
                "burst": len(self._fifo[capacity:]),
                "burst_began": self._burst_began,
                "silent_until": self._silent_until,
                "opening_until": self._opening_until,
                "receive_deadline": self._receive_timer.deadline,
                "read_lately": self._read_lately,
                "looped": self._looped,
            },
        )

    def restore(self, payload: Payload) -> None:
        if payload.version == 1:  # of a snapshot that was taken before input came in bursts
            payload = evolve(payload, version=self.VERSION, body={**payload.body, **_ADDED_TO_VERSION_1})
        values = fields.read(payload, self.kind, self.VERSION, self.SCHEMA)
        fcr, capacity = values["fcr"], FIFO_SIZE if values["fcr"] & FCR_ENABLE else 1
        burst = values["burst"]
        if (
            fcr & ~_FCR_KEPT
            or (fcr and not fcr & FCR_ENABLE)
            or len(values["fifo"]) > capacity
            or burst > len(values["queue"])
            or (burst and len(values["fifo"]) < capacity)
        ):
            raise StateError(f"{self.kind}: its saved state is wrong: the FIFO is in a state the chip does not have.")
        self._stop()
        self._ier = values["ier"]
        self._fcr = values["fcr"]
        self._lcr = values["lcr"]
        self._mcr = values["mcr"]
        self._scratch = values["scratch"]
        self._divisor = values["divisor"]
        self._modem_delta = values["modem_delta"]
        self._transmit_pending = values["transmit_pending"]
        self._fifo[:] = values["fifo"] + values["queue"][:burst]
        self._queue[:] = values["queue"][burst:]
        self._lsr = LSR_TRANSMITTER_EMPTY | (LSR_DATA if self._fifo else 0)
        for name in ("burst_began", "silent_until", "opening_until", "read_lately", "looped"):
            setattr(self, f"_{name}", values[name])
        if values["receive_deadline"] is not None:
            self._receive_timer.arm(values["receive_deadline"])
        self._mode_changed()
        self._irq.set_level(self._irq_level)

    def close(self) -> None:
        self.flush()
