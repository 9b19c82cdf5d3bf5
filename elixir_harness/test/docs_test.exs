defmodule DSPex.DocsTest do
  @moduledoc "What is documented is all there is, and is so: modules, settings, errors."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Error, Monitor, Options, Pool}
  alias DSPex.Test.{Helpers, Loopback, RawPeer}

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

  test "every example with a result is run by a test" do
    tests = "test/**/*_test.exs" |> Path.wildcard() |> Enum.map_join(&File.read!/1)

    for module <- modules(),
        {text, docs} = docs(module),
        docs_and_examples = [text | Enum.map(docs, &elem(&1, 3))],
        Enum.any?(docs_and_examples, &example?/1),
        do:
          assert(
            tests =~ ~r/^  doctest ([\w.]+\.)?#{module |> Module.split() |> List.last()}$/m,
            inspect(module)
          )
  end

  defp example?(%{"en" => text}), do: text =~ ~r/iex> [^\n]+\n +(?!iex>|\.\.\.>)\S/
  defp example?(_none), do: false

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

    assert [name: Pool, pool_size: 3, cluster: nil] == listed("A Pool")
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
        [telemetry_metadata: %{tenant: "acme"}]

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
  test "protocol.md's port answers, and nothing once it is closed: both its ends are" do
    [_, code] = Regex.run(~r/^```elixir\n(.*?)^```/ms, page("protocol"))

    # Were the input alone at its end, the peer would wait for its run: for a minute here.
    given = [
      {"/path/to/python", Helpers.python()},
      {"openai/gpt-4o-mini", "offline/echo"},
      {"env: [", "env: [{~c\"DSPY_BRIDGE_DRAIN_MS\", ~c\"60000\"}, "}
    ]

    code = Enum.reduce(given, code, fn {part, other}, code -> replace_one(code, part, other) end)
    {pong, binding} = Code.eval_string(code)
    assert %{"id" => 1, "success" => true} = JSON.decode!(pong)
    port = Keyword.fetch!(binding, :port)
    {:os_pid, os_pid} = Port.info(port, :os_pid)

    assert %{"success" => true} =
             ask(port, %{
               id: 2,
               command: "create_program",
               args: %{
                 id: "a",
                 signature: "q -> a",
                 program_type: "react",
                 tools: [%{name: "search", args: %{}}]
               }
             })

    # It waits for the tool, and would for ever.
    assert %{"tool_call" => %{"call_id" => 1}} =
             ask(port, %{
               id: 3,
               command: "execute_program",
               args: %{program_id: "a", inputs: %{q: "x"}}
             })

    true = Port.close(port)
    Helpers.eventually(fn -> not Helpers.alive?(os_pid) end)
  end

  defp replace_one(text, part, other) do
    assert [before, rest] = String.split(text, part)
    before <> other <> rest
  end

  defp ask(port, message) do
    true = Port.command(port, JSON.encode!(message))
    assert_receive {^port, {:data, frame}}, 60_000
    JSON.decode!(frame)
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

  @broken """
  import dspy


  class Broken(dspy.Module):
      async def aforward(self, question):
          raise RuntimeError("on purpose")
  """
  @why %{program_id: "qa", inputs: %{question: "Why?"}}
  @best %{program_id: "best", inputs: %{question: "Why?"}}

  @tag :tmp_dir
  @tag timeout: 120_000
  test "each error says what errors.md says of it", %{tmp_dir: dir} do
    File.write!(Path.join(dir, "broken.py"), @broken)
    env = %{"PYTHONPATH" => dir, "DSPY_BRIDGE_ALLOW_MODULES" => "broken"}
    bridge = start(lm: "offline/echo", env: env)
    create(bridge, "qa", %{})
    create(bridge, "best", %{program_type: "best_of_n", options: %{reward: %{tool: "brevity"}}})

    for {type, text, again} <- errors() do
      got = provoke(type, bridge)

      if type == :pool_exhausted do
        assert inspect(got) == text
      else
        assert {:error, %Error{type: ^type, message: message, retryable: retryable}} = got
        # A reference into the log differs from run to run.
        assert String.replace(message, ~r/[0-9a-f]{8}$/, "") ==
                 String.replace(text, ~r/[0-9a-f]{8}$/, "")

        assert again == if(retryable, do: "yes", else: "no") or type == :lm_error
      end
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

  defp provoke(:tool_error, bridge), do: execute(bridge, @best)
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

  defp provoke(:internal, bridge) do
    create(bridge, "broken", %{program_type: "broken:Broken"})
    execute(bridge, %{@why | program_id: "broken"})
  end

  defp provoke(:lm_not_configured, _bridge) do
    bridge = start([])
    create(bridge, "qa", %{})
    execute(bridge, @why)
  end

  defp provoke(:lm_error, bridge) do
    answered(bridge, "500 Oh", %{
      error: %{message: "The server had an error", type: "server_error"}
    })
  end

  defp provoke(:output_invalid, bridge) do
    message = %{role: "assistant", content: "I would say seven."}
    choice = %{index: 0, finish_reason: "stop", message: message}

    answered(bridge, "200 OK", %{
      id: "c",
      object: "chat.completion",
      created: 0,
      model: "m",
      choices: [choice]
    })
  end

  defp provoke(:overloaded, _bridge) do
    bridge = start(lm: "offline/echo", max_pending: 1)
    {caller, _peer} = hold(bridge)
    got = Bridge.request(bridge, :ping, %{}, [])
    Task.shutdown(caller, :brutal_kill)
    got
  end

  defp provoke(:python_process_died, _bridge) do
    bridge = start(lm: "offline/echo")
    {caller, os_pid} = hold(bridge)
    Helpers.kill(os_pid)
    Task.await(caller)
  end

  defp provoke(:cancelled, _bridge) do
    peer = RawPeer.open()

    args = %{
      id: "best",
      signature: "question -> answer",
      program_type: "best_of_n",
      options: %{reward: %{tool: "brevity"}}
    }

    %{"success" => true} =
      RawPeer.exchange(
        peer,
        JSON.encode!(%{id: 1, command: "create_program", args: args}),
        60_000
      )

    %{"tool_call" => _} =
      RawPeer.exchange(peer, JSON.encode!(%{id: 2, command: "execute_program", args: @best}))

    reply = RawPeer.exchange(peer, ~s({"cancel":2}))
    {:error, Error.from_peer(reply["error_type"], reply["error"], reply["retryable"])}
  end

  defp provoke(:pool_exhausted, _bridge) do
    pool = Module.concat(__MODULE__, Pool)
    start_supervised!({Pool, name: pool, pool_size: 1, python_executable: Helpers.python()})
    # Its peer has not started.
    Pool.checkout(pool)
  end

  defp start(opts) do
    opts = [name: nil, python_executable: Helpers.python()] ++ opts
    start_supervised!({Bridge, opts}, id: make_ref())
  end

  defp create(bridge, id, more) do
    args = Map.merge(%{id: id, signature: "question -> answer"}, more)
    {:ok, _} = Bridge.call(bridge, :create_program, args, 60_000)
  end

  # A call that is under way for as long as it may.
  defp hold(bridge) do
    create(bridge, "best", %{program_type: "best_of_n", options: %{reward: %{tool: "brevity"}}})
    test = self()
    tool = fn _args -> send(test, :held) && Process.sleep(:infinity) end
    caller = Task.async(fn -> execute(bridge, @best, retry: false, tools: %{brevity: tool}) end)
    assert_receive :held, 10_000
    {caller, Bridge.get_status(bridge).os_pid}
  end

  # A run with an LM that gives this answer.
  defp answered(bridge, status, body) do
    json = JSON.encode!(body)

    head =
      "HTTP/1.1 #{status}\r\ncontent-type: application/json\r\ncontent-length: #{byte_size(json)}\r\n\r\n"

    port =
      Loopback.start(fn socket, _test ->
        Loopback.answer_requests(socket, fn -> [head, json] end)
      end)

    lm = %{
      model: "openai/gpt-4o-mini",
      api_base: "http://127.0.0.1:#{port}/v1",
      api_key: "x",
      num_retries: 0
    }

    execute(bridge, Map.put(@why, :lm, lm))
  end

  defp execute(bridge, args, opts \\ []), do: Bridge.request(bridge, :execute_program, args, opts)
end
