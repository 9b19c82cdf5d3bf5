defmodule MyApp.States do
  @moduledoc "The page's table of states."

  def start do
    ExUnit.Callbacks.start_supervised!(%{
      id: __MODULE__,
      start: {Agent, :start_link, [fn -> %{} end, [name: __MODULE__]]}
    })
  end

  def insert(program, version, text) when is_binary(text),
    do: Agent.update(__MODULE__, &Map.put(&1, {program, version}, text))

  def fetch!(program, version), do: Agent.get(__MODULE__, &Map.fetch!(&1, {program, version}))
end

defmodule DSPex.OptimizingPageTest do
  @moduledoc "Runs docs/optimizing.md with the real peer and an LM that goes by the instructions and demos that it gets."

  # It works in a folder, as a reader would.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureIO

  alias DSPex.Test.{EvalTask, Page, TriageLM}

  @page "docs/optimizing.md"
  @external_resource Page.path(@page)
  @modules [MyApp.CSV, MyApp.TicketData, MyApp.Tickets, MyApp.Triage]

  setup %{tmp_dir: dir} do
    cwd = File.cwd!()
    File.cd!(dir)

    on_exit(fn ->
      File.cd!(cwd)
      Application.delete_env(:my_app, :triage)
      for module <- @modules, do: :code.delete(module) && :code.purge(module)
    end)

    put_config(:python_bridge, [python_executable: python()] ++ TriageLM.start())
    File.write!("tickets.csv", csv())
    MyApp.States.start()
    :ok
  end

  @moduletag :tmp_dir
  @tag timeout: 120_000
  test "from the CSV to a program that routes all tickets rightly, as shown" do
    output = capture_io(fn -> run(Page.blocks(@page)) end)
    lines = String.split(output, ["\r", "\n"])
    page = File.read!(Page.path(@page))

    shown =
      Regex.scan(~r/^```text\n((?:score|candidate) .+?)^```$/ms, page, capture: :all_but_first)

    assert length(shown) == 2

    for line <- String.split("#{shown}", "\n", trim: true),
        line != "…",
        do: assert(Enum.any?(lines, &(steady(&1) == steady(line))), line)

    # The files of the mix tasks, with what the page has made.
    File.mkdir_p!("eval")
    write("eval/triage.exs")
    write("eval/triage-optimize.exs")

    assert %{status: 0, out: "score 1.000" <> _} =
             EvalTask.run(["eval/triage.exs", "--min", "0.9"])

    args = ["eval/triage-optimize.exs", "--out", "triage-3.json", "--lm-calls", "300"]
    assert %{status: 0} = EvalTask.run(args, Mix.Tasks.Dspex.Optimize)
    assert %{"demos" => [_ | _]} = JSON.decode!(File.read!("triage-3.json"))
  end

  defp write(path) do
    head = "# #{path}\n"
    [file] = for code <- Page.blocks(@page), String.starts_with?(code, head), do: code
    File.write!(path, file)
  end

  # Questions that are asked twice at once make LM calls differ.
  defp steady(line), do: String.replace(line, ~r/\d+ LM calls|[\d.]+ s$/, "")

  defp run(blocks) do
    Enum.reduce(blocks, {[], Code.env_for_eval([])}, fn code, {binding, env} ->
      # The LM of the configuration, which is TriageLM.
      code = String.replace(code, ~s(   lm: "openai/gpt-4o-mini",\n), "")
      code = String.replace(code, "openai/gpt-4o-mini", "openai/stub")
      quoted = Code.string_to_quoted!(code, file: Page.path(@page))
      {_value, binding, env} = Code.eval_quoted_with_env(quoted, binding, env)
      if code =~ ~r/^children = /m, do: Enum.each(binding[:children], &start_supervised!/1)
      {binding, env}
    end)
  end

  # The four lines that the page shows, and 36 like them.
  defp csv do
    [_, head, parcel, invoice, password, other] =
      Regex.run(~r/^```csv\n(.+\n)(.+\n)(.+\n)(.+\n)(.+\n)```$/m, File.read!(Page.path(@page)))

    more =
      for n <- 2..10,
          line <- [parcel, invoice, password, other],
          do: String.replace(line, ~r/^"?/, "\\0No. #{n}: ")

    Enum.join([head, parcel, invoice, password, other | more])
  end
end
