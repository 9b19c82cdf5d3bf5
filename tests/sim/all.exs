# Loads the simulation: for `make sim`, and for its test in elixir_harness/test.
files = for file <- ~w(instrument world net pg runtime peer node load faults checks scenarios mutations), do: Path.join(__DIR__, "#{file}.exs")
{:ok, _modules, _warnings} = Kernel.ParallelCompiler.compile(files, return_diagnostics: true)
