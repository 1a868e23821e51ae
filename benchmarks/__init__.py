"""Time, memory and error of the distillation losses, beside what the machine can do and what others take.

    python -m benchmarks.run [--quick] [--cases WORDS] [--out FILE]     measure, write the JSON, the table and the plot
    python -m benchmarks.report [--readme] [--targets]                  tables from the JSON

| file | holds |
|---|---|
| `shapes.py` | the cases |
| `registry.py` | bytes, exponentials and flops of each op |
| `floors.py`, `floors.c` | the machine's limits, measured |
| `inputs.py` | tensors of a case and how a gradient is taken |
| `rivals/` | one file per contestant: what it computes, in which documented setting |
| `checks.py` | every contestant is right before it is timed; a red check has no time |
| `timing.py` | medians of alternating runs, ratios with spread |
| `bench_time.py` | the timings, as pytest-benchmark cases |
| `memory.py` | peak extra memory, one fresh process per case and contestant |
| `accuracy.py` | errors against float64 |
| `targets.py`, `targets_cache.py` | what must be reached, met or missed |
| `run.py`, `report.py`, `plot.py` | the command, the tables, the picture |
"""
