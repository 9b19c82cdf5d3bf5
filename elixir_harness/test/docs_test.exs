defmodule DSPex.DocsTest do
  @moduledoc "What is documented is all there is, and is so: modules, settings, errors."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Error, Monitor, Options, Pool}
  alias DSPex.Test.Helpers

  @root Path.expand("../..", __DIR__)

  defp page(name), do: File.read!(Path.join(@root, "docs/#{name}.md"))

  ## Modules

  defp groups, do: Mix.Project.config()[:docs].()[:groups_for_modules]

  defp public, do: Enum.flat_map(groups(), fn {_title, modules} -> modules end)

  defp modules do
    {:ok, modules} = :application.get_key(:dspex, :modules)
    # Those of the tests are compiled into the same application, and a protocol's come with it.
    Enum.filter(modules, &(inspect(&1) =~ ~r/^(DSPex\.(?!Test\b)|Mix\.Tasks\.Dspex\.)/))
  end

  defp docs(module) do
    {:docs_v1, _line, :elixir, _format, text, _meta, docs} = Code.fetch_docs(module)
    {text, docs}
  end

  test "the docs show the modules that an application calls, in groups, and no others but Mix tasks" do
    shown =
      for module <- modules(), {%{"en" => text}, _docs} <- [docs(module)], do: {module, text}

    for {module, text} <- shown, do: assert(String.length(text) > 40, inspect(module))
    {tasks, shown} = Enum.split_with(shown, fn {m, _} -> inspect(m) =~ "Mix.Tasks." end)
    assert length(tasks) == 5
    assert Enum.sort(public()) == shown |> Enum.map(&elem(&1, 0)) |> Enum.sort()
  end

  test "every public function has a doc and a type" do
    for module <- public(),
        {{:function, name, arity}, _line, _signature, text, _meta} <- elem(docs(module), 1) do
      function = "#{inspect(module)}.#{name}/#{arity}"
      assert text != :none, "#{function} has no @doc"

      # Callbacks are hidden: what they do is their behaviour's. What `use` makes brings its own text.
      assert text == :hidden or name == :child_spec or specified?(module, name, arity),
             "#{function} has no @spec"
    end
  end

  defp specified?(module, name, arity) do
    {:ok, specs} = Code.Typespec.fetch_specs(module)
    List.keymember?(specs, {name, arity}, 0)
  end

  doctest Monitor
  doctest Options

  ## Settings

  # Their default is not a value; the page describes it in words.
  @said [:python_executable, :script_path, :lm, :lm_options, :adapter, :env, :programs]

  test "settings.md lists every option, with its default" do
    {:ok, options} = Options.new([], Bridge)
    assert Enum.sort(Keyword.keys(listed("A Bridge"))) == Enum.sort(Options.known())

    for {option, default} <- listed("A Bridge"),
        option not in @said,
        do: assert(default == Map.fetch!(options, option), inspect(option))

    {:ok, defaults} = Monitor.options()
    assert Map.new(listed("A Monitor")) == defaults

    assert [name: DSPex.PythonBridge.Supervisor, bridge: "[]", monitor: "[]", programs: "none"] =
             listed("A Supervisor")

    assert [name: Pool, pool_size: 3, cluster: nil, budgets: "none"] == listed("A Pool")
  end

  test "settings.md lists every option of a call" do
    {:ok, types} = Code.Typespec.fetch_types(Bridge)

    typed =
      for {:type, {name, {:type, _, :union, kinds}, []}} <- types,
          name in [:stream_option, :request_option],
          {:type, _, :tuple, [{:atom, _, option}, _value]} <- kinds,
          do: option

    all =
      [timeout: 1_000, retry: true, tools: %{}, traceparent: nil, on_chunk: &is_map/1] ++
        [attempts: 3, max_concurrency: 8, item_timeout_ms: 1_000, history: true] ++
        [budget: [usd: 0.05], telemetry_metadata: %{tenant: "acme"}]

    assert Enum.sort(typed) == Enum.sort(Keyword.keys(all))
    assert Enum.sort(Keyword.keys(listed("One call"))) == Enum.sort(typed)
    # All of them are accepted.
    assert {:error, %Error{type: :bridge_not_running}} =
             Bridge.request(NoSuchBridge, :execute_program, %{}, all)
  end

  # The table under a heading: each option and its default.
  defp listed(heading) do
    [_, section] = Regex.run(~r/^## #{heading}\n(.*?)(?=^## |\z)/ms, page("settings"))

    for [option, default] <-
          Regex.scan(~r/^\| `:(\w+)` \| (.*?) \|/m, section, capture: :all_but_first),
        do: {String.to_existing_atom(option), value(String.trim(default, "`"))}
  end

  defp value("nil"), do: nil
  defp value("true"), do: true
  defp value("DSPex." <> _rest = module), do: Module.concat([module])

  defp value(text) do
    case Integer.parse(text) do
      {number, ""} -> number
      _words -> text
    end
  end

  ## The protocol

  @tag timeout: 120_000
  test "protocol.md's port answers, and its process ends once it is closed" do
    [_, code] = Regex.run(~r/^```elixir\n(.*?)^```/ms, page("protocol"))

    given = [
      {"/path/to/python", Helpers.python()},
      {"openai/gpt-4o-mini", "offline/echo"}
    ]

    code = Enum.reduce(given, code, fn {part, other}, code -> replace_one(code, part, other) end)
    {pong, binding} = Code.eval_string(code)
    assert %{"id" => 1, "success" => true} = JSON.decode!(pong)
    port = Keyword.fetch!(binding, :port)
    {:os_pid, os_pid} = Port.info(port, :os_pid)

    true = Port.close(port)
    Helpers.eventually(fn -> not Helpers.alive?(os_pid) end)
  end

  defp replace_one(text, part, other) do
    assert [before, rest] = String.split(text, part)
    before <> other <> rest
  end

  ## Errors

  # Of errors.md: each type, what it says, and whether the same may succeed another time.
  defp errors do
    for [type, text, again] <-
          Regex.scan(~r/^\| `:(\w+)` \| `(.*?)` \| (.*?) \|/m, page("errors"),
            capture: :all_but_first
          ),
        do: {String.to_existing_atom(type), text, again}
  end

  test "errors.md has a row for each type" do
    {:ok, types} = Code.Typespec.fetch_types(Error)
    [atoms] = for {:type, {:type, {:type, _, :union, atoms}, []}} <- types, do: atoms
    known = for {:atom, _, type} <- atoms, do: type

    assert Enum.sort(for {type, _, _} <- errors(), do: type) ==
             Enum.sort([:pool_exhausted | known])
  end

  @why %{program_id: "qa", inputs: %{question: "Why?"}}

  # The other types have tests in contract/ and client/; their texts depend on the LM, or on the time.
  @provoked ~w(invalid_json invalid_request invalid_args unknown_command frame_too_large program_not_found
               lm_not_configured not_allowed bridge_not_running timeout)a

  @tag timeout: 120_000
  test "an error says what errors.md says of it" do
    bridge = start([])
    create(bridge, "qa", %{})
    rows = for {type, text, again} <- errors(), type in @provoked, do: {type, text, again}
    assert length(rows) == length(@provoked)

    for {type, text, again} <- rows do
      assert {:error, %Error{type: ^type, message: ^text} = error} = provoke(type, bridge)
      assert again == if(error.retryable, do: "yes", else: "no")
    end
  end

  defp provoke(:invalid_args, bridge),
    do: execute(bridge, %{program_id: "qa", inputs: %{qestion: "Why?"}})

  defp provoke(:invalid_request, bridge), do: execute(bridge, @why, retry: 1)

  defp provoke(:unknown_command, bridge), do: Bridge.request(bridge, :optimize, %{}, [])

  defp provoke(:program_not_found, bridge),
    do: execute(bridge, %{program_id: "tirage", inputs: %{}})

  defp provoke(:invalid_json, bridge),
    do: Bridge.request(bridge, :ping, %{n: Integer.pow(10, 5_000)}, [])

  defp provoke(:bridge_not_running, _bridge), do: execute(MyApp.Brigde, @why)

  # Of the peer's own deadline, which may come first, the text is another.
  defp provoke(:timeout, _bridge),
    do: execute(start(script_path: Helpers.fake("silent")), @why, timeout: 100)

  defp provoke(:frame_too_large, _bridge) do
    # As long as the page has it.
    small = start(max_frame_bytes: 1_000)
    Bridge.request(small, :ping, %{big: String.duplicate("a", 2_000)}, [])
  end

  defp provoke(:not_allowed, bridge) do
    args = %{id: "other", signature: "question -> answer", program_type: "other.module:Class"}
    Bridge.request(bridge, :create_program, args, [])
  end

  defp provoke(:lm_not_configured, bridge), do: execute(bridge, @why)

  defp start(opts) do
    opts = [name: nil, python_executable: Helpers.python()] ++ opts
    start_supervised!({Bridge, opts}, id: make_ref())
  end

  defp create(bridge, id, more) do
    args = Map.merge(%{id: id, signature: "question -> answer"}, more)
    {:ok, _} = Bridge.call(bridge, :create_program, args, 60_000)
  end

  defp execute(bridge, args, opts \\ []), do: Bridge.request(bridge, :execute_program, args, opts)
end
