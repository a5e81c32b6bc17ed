"""How all pictures of tools/ look, and how they are saved."""

from nanotst import UserError

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "osD^vPX"


def new_figure(size, rows=1, columns=1, **panels):
    """(figure, axes) of `size` in inches. UserError if matplotlib is missing, which tables do not need."""
    try:
        from matplotlib.figure import Figure  # without pyplot it needs no display
    except ImportError:
        raise UserError("pictures need matplotlib (pip install matplotlib)") from None
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    return figure, figure.subplots(rows, columns, **panels)


def tidy(ax):
    """A light grid behind the curves, no frame above and to the right."""
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def save_picture(figure, path):
    """Write a picture; the ending of its name sets the format."""
    try:
        figure.savefig(path)
    except ValueError as e:  # an ending that matplotlib does not know
        raise UserError(f"cannot draw {path}: {' '.join(str(e).split())[:200]}") from None
