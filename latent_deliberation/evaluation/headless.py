"""matplotlib for pictures in files, whatever MPLBACKEND says.

Every module that draws imports it from here. A notebook sets MPLBACKEND for all commands that it
starts, and matplotlib does not load where that backend is not installed. Files need no backend.
"""

import contextlib
import os

_BACKEND = os.environ.pop('MPLBACKEND', None)

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

if _BACKEND is not None:
  os.environ['MPLBACKEND'] = _BACKEND  # for processes that this one starts
  # A notebook that uses this library has the backend, and needs it for its own pictures.
  with contextlib.suppress(ValueError):
    matplotlib.rcParams['backend'] = _BACKEND

__all__ = ['Axes', 'Figure', 'FigureCanvasAgg', 'ListedColormap', 'MaxNLocator', 'Patch']
