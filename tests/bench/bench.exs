# The measuring part of `make bench`: a line of JSON for each row. Started by run.py with `pinned` or `free`, and the names of
# the rows; without names, all.

Code.require_file("measuring.exs", __DIR__)
Code.require_file("pinned.exs", __DIR__)
Code.require_file("free.exs", __DIR__)

Logger.configure(level: :warning)

[mode | names] = System.argv()
rows = if mode == "pinned", do: Bench.Pinned.rows(), else: Bench.Free.rows()
for {name, measure} <- rows, names == [] or name in names, do: Bench.report(name, measure.())
