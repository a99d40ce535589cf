"""Signals: those that end a command, held back until somebody knows what there is to undo."""

import signal
import threading

ONE_SIGNAL = 0.3
"""Seconds in which the same signal again is the same request: timeout(1) sends it to the process
and to its group."""


class HeldBack:
    """SIGINT and SIGTERM, whose handlers raise exceptions, noted from now on until ``release``.

    So an exception finds somebody who knows of a child that is just being started. To block the
    signals would not do: where there are other threads they take them, and the handler runs in the
    main one all the same. In another thread there is nothing to hold back, for no handler runs
    there.
    """

    def __init__(self) -> None:
        self._noted: list[int] = []
        self._handlers = {
            number: handler
            for number in (signal.SIGINT, signal.SIGTERM)
            if _is_main_thread() and callable(handler := signal.getsignal(number))
        }
        for number in self._handlers:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self._noted.append(number)

    def release(self) -> None:
        """Give the signals back to their handlers, those that came meanwhile too, once."""
        for number, handler in reversed(tuple(self._handlers.items())):
            signal.signal(number, handler)
            del self._handlers[number]  # one given back may raise: a second call goes on
        while self._noted:
            signal.raise_signal(self._noted.pop())


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
