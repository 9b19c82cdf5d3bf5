defmodule DSPex.PythonBridge.OptionsTest do
  # Some tests set the application's configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Monitor, Options, Pool, Supervisor}
  alias DSPex.PythonBridge.Protocol.PeerEnv

  doctest PeerEnv
  doctest DSPex.PythonBridge.Options.Table

  test "defaults come from the application's configuration, options go before it" do
    put_config(:python_bridge, max_retries: 7, default_timeout: 1_000)
    assert {:ok, %Options{max_retries: 7, default_timeout: 5}} = Options.new(default_timeout: 5)
  end

  test "a wrong option is refused with an error that names it" do
    for {opt, value} <- [
          name: "a string",
          python_executable: "",
          python_executable: :python,
          script_path: 5,
          lm: "",
          lm: :gpt,
          lm: "a\0b",
          lm: %{},
          lm: %{temperature: 0.5},
          lm: %{model: ""},
          lm: %{model: :gpt},
          lm: %{model: "a", pid: self()},
          lm: [model: "a"],
          lm: %URI{},
          lm_options: "text",
          lm_options: %{pid: self()},
          adapter: 5,
          env: [{"A", "b"}],
          env: %{"A" => 1},
          env: %{"A=B" => "c"},
          env: %{"" => "c"},
          env: %{"A" => "c\0"},
          env: %{a: "c"},
          max_frame_bytes: 0,
          max_frame_bytes: 4_000_000_000,
          default_timeout: 0,
          default_timeout: 1.5,
          max_retries: -1,
          max_retries: :many,
          max_pending: 0,
          start_timeout: :infinity,
          no_such_option: 1
        ] do
      assert {:error, %ArgumentError{message: message}} = Options.new([{opt, value}])
      assert message =~ inspect(opt)
      assert {:error, %ArgumentError{message: ^message}} = Bridge.start_link([{opt, value}])
    end

    for start <-
          [&Bridge.start_link/1, &Pool.start_link/1, &Monitor.start_link/1] ++
            [&Supervisor.start_link/1, &Options.new/1],
        opts <- [%{name: :a}, [1 | 2], [{:lm, "a"} | 2]] do
      assert {:error, %ArgumentError{message: message}} = start.(opts)
      assert message =~ "options: expected a keyword list"
    end

    put_config(:python_bridge, :nonsense)
    assert {:error, %ArgumentError{message: message}} = Options.new([])
    assert message =~ "config"
  end

  test "a refusal does not repeat values that may be secret" do
    for opts <- [
          [lm: %{api_key: "sk-secret"}],
          [lm_options: "sk-secret"],
          [env: %{"KEY=" => "sk-secret"}],
          [env: "sk-secret"]
        ] do
      {:error, error} = Options.new(opts)
      refute Exception.message(error) =~ "sk-secret"
    end
  end

  test "settings for the peer go into its environment" do
    {:ok, options} =
      Options.new(
        lm: "openai/x",
        lm_options: [api_key: "sk-é€𝄞", temperature: 0.5],
        adapter: :json,
        max_frame_bytes: 1_000,
        env: %{"A" => "b", "DSPY_BRIDGE_LM" => "loses to the option"}
      )

    env = options.env.()
    assert %{"A" => "b", "DSPY_BRIDGE_LM" => "openai/x", "DSPY_BRIDGE_ADAPTER" => "json"} = env
    assert env["DSPY_BRIDGE_MAX_FRAME_BYTES"] == "1000"

    json = env["DSPY_BRIDGE_LM_OPTIONS"]
    assert JSON.decode!(json) == %{"api_key" => "sk-é€𝄞", "temperature" => 0.5}
    # What the locale makes of other characters is not left to chance.
    assert json =~ "sk-\\u00E9\\u20AC\\uD834\\uDD1E"
  end

  test ":lm is a string, or a map whose other keys go with :lm_options" do
    env = fn opts ->
      {:ok, options} = Options.new(opts)
      env = options.env.()
      json = env["DSPY_BRIDGE_LM_OPTIONS"]
      {env["DSPY_BRIDGE_LM"], json && JSON.decode!(json)}
    end

    assert env.(lm: "openai/x") == {"openai/x", nil}
    assert env.(lm: %{model: "openai/x"}) == {"openai/x", nil}

    for lm <- [
          %{model: "openai/x", temperature: 0.5},
          %{"model" => "openai/x", "temperature" => 0.5}
        ] do
      assert env.(lm: lm) == {"openai/x", %{"temperature" => 0.5}}

      for more <- [%{"api_key" => "sk"}, [api_key: "sk"]] do
        assert env.(lm: lm, lm_options: more) ==
                 {"openai/x", %{"temperature" => 0.5, "api_key" => "sk"}}
      end
    end
  end

  test "the peer sends its log records as frames, unless :env sets that" do
    frames = fn opts ->
      {:ok, options} = Options.new(opts)

      options.env.()["DSPY_BRIDGE_LOG_FRAMES"]
    end

    assert frames.(env: %{"A" => "b"}) == "1"
    # What the peer refuses is its own to refuse.
    for value <- ["0", "maybe"],
        do: assert(frames.(env: %{"DSPY_BRIDGE_LOG_FRAMES" => value}) == value)
  end

  test "no inspection shows secrets, sealed or not" do
    opts = [
      lm: %{model: "openai/x", headers: %{"X-Key" => "sk-secret"}},
      lm_options: %{api_key: "sk-secret"},
      env: %{"KEY" => "sk-secret"}
    ]

    {:ok, options} = Options.new(opts)
    refute inspect(options, limit: :infinity) =~ "sk-secret"
    refute inspect(Options.seal(opts), limit: :infinity) =~ "sk-secret"
    refute inspect(Bridge.child_spec(opts), limit: :infinity) =~ "sk-secret"
    assert {:ok, sealed} = Options.new(Options.seal(opts))
    assert sealed.env.() == options.env.()

    for wrong <- [Map.new(opts), ["more" | opts]] do
      for server <- [Bridge, Pool] do
        %{start: {server, :start_link, [sealed]}} = server.child_spec(wrong)
        refute inspect(sealed, limit: :infinity) =~ "sk-secret"
        assert {:error, error} = server.start_link(sealed)
        refute Exception.message(error) =~ "sk-secret"
      end
    end
  end

  test "an option that is misspelt is named with the nearest that there is" do
    alias DSPex.PythonBridge.Client

    for {start, opts, nearest} <- [
          {&Options.new/1, [max_retrys: 1], "max_retries"},
          {&Bridge.start_link/1, [nmae: :x], "name"},
          {&Pool.start_link/1, [pool_sise: 1], "pool_size"},
          {&Pool.start_link/1, [lm_option: %{}], "lm_options"},
          {&Monitor.start_link/1, [intervall: 1], "interval"},
          {&Supervisor.start_link/1, [bridges: []], "bridge"},
          {&Client.Options.new(&1, [:timeout, :retry]), [timeuot: 5], "timeout"}
        ] do
      assert {:error, %{message: text}} = start.(opts)
      assert text =~ "unknown option :#{hd(Keyword.keys(opts))}, did you mean :#{nearest}?"
    end
  end
end
