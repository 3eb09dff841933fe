"""Of the host's own script ``scripts/xyz_grid.py``: an axis, and how the values of one are read."""

import csv
from io import StringIO
from itertools import chain


def csv_string_to_list_strip(data_str):
    return list(map(str.strip, chain.from_iterable(csv.reader(StringIO(data_str), skipinitialspace=True))))


def list_to_csv_string(data_list):
    with StringIO() as o:
        csv.writer(o).writerow(data_list)
        return o.getvalue().strip()


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.choices, self.prepare = label, type, apply, choices, prepare


def process_axis(opt, vals, vals_dropdown=(), csv_mode=False):
    if opt.choices is not None and not csv_mode:
        values = vals_dropdown
    elif opt.prepare is not None:
        values = opt.prepare(vals)
    else:
        values = csv_string_to_list_strip(vals)
    return [opt.type(v) for v in values]
