# The measuring part of `make bench` and `make growth`: a line of JSON for each row. Started by run.py or growth.py with
# `pinned`, `free` or `growth`, and the names of the rows; without names, all.

for file <- ~w(measuring least_server calls optimizing pinned free growth), do: Code.require_file("#{file}.exs", __DIR__)

Logger.configure(level: :warning)

[mode | names] = System.argv()
kinds = %{"pinned" => Bench.Pinned, "free" => Bench.Free, "growth" => Bench.Growth}
for {name, measure} <- kinds[mode].rows(), names == [] or name in names, do: Bench.report(name, measure.())
