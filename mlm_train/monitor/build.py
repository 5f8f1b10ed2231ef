"""The callbacks of a run: the built-in ones, then the user's."""

from mlm_train.monitor.callback import Callback, Callbacks, Context
from mlm_train.monitor.garbage import GarbageCollection
from mlm_train.monitor.heartbeat import Heartbeat
from mlm_train.monitor.monitor import Monitor
from mlm_train.monitor.stragglers import Stragglers
from mlm_train.utils.extensions import find

OURS = (Heartbeat, Stragglers, Monitor, GarbageCollection)


def build_callbacks(context: Context) -> Callbacks:
    """The built-in callbacks and those of config field monitor.callbacks. Every rank calls it."""
    theirs = [find("monitor.callbacks", name, {}, Callback) for name in context.config.monitor.callbacks]
    return Callbacks(kind(context) for kind in (*OURS, *theirs))
