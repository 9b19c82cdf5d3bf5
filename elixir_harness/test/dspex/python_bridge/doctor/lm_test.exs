defmodule DSPex.PythonBridge.Doctor.LMTest do
  # What DSPy and LiteLLM really say, but for the last ones. No request is made. Each of these looks imports DSPy: what is
  # slow here is quick with the facts of an interpreter that reports them, or in tests/root/test_check_lm.py.
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Options
  alias DSPex.PythonBridge.Doctor.LM

  @moduletag :tmp_dir

  @key "sk-0123456789abcdef"
  @unset ~w(DSPY_BRIDGE_LM OPENAI_API_KEY GEMINI_API_KEY GOOGLE_API_KEY MISTRAL_API_KEY)

  # Nobody's keys but those of the test.
  defp check(model, opts \\ [], python \\ python()) do
    env = Map.merge(Map.new(@unset, &{&1, ""}), Keyword.get(opts, :env, %{}))
    {:ok, options} = Options.new([lm: model] ++ Keyword.put(opts, :env, env))
    {status, found, advice, _fact} = LM.check(python, options)
    refute "#{found}#{advice}" =~ @key
    {status, found, advice}
  end

  test "none configured is a note, with the line for it" do
    assert {:note, "config :dspex, :python_bridge has no default LM", advice} = check(nil)
    assert advice =~ "config :dspex, :python_bridge, lm: "
  end

  @tag :slow
  test "one that has its key: where it is set, never its value" do
    env = %{"OPENAI_API_KEY" => @key}

    assert check("openai/gpt-4o-mini", env: env) ==
             {:ok, "openai/gpt-4o-mini: its key is set, OPENAI_API_KEY", nil}

    options = [lm_options: %{api_key: @key, model: "another"}]
    text = "openai/gpt-4o-mini: its key is set, in :lm_options or DSPY_BRIDGE_LM_OPTIONS"
    assert check("openai/gpt-4o-mini", options) == {:ok, text, nil}
  end

  test "one that lacks its key fails: which variables to set" do
    assert {:failed, "gemini/x: its key is not set", advice} = check("gemini/x")
    assert advice =~ "set GEMINI_API_KEY or GOOGLE_API_KEY in the environment of the BEAM"
    assert advice =~ "or api_key in :lm_options"
  end

  test "one that is built in passes" do
    assert {:ok, "offline/echo" <> _more, nil} = check("offline/echo")
    assert {:ok, "offline/script" <> _more, nil} = check("offline/script")
  end

  @tag :slow
  test "one at your own address without a key fails if DSPy needs one for each call" do
    assert {:failed, found, advice} =
             check("openai/x", lm_options: %{api_base: "http://[::1]/v1"})

    assert found == "openai/x: its key is not set"
    assert advice =~ "for a server that needs none, any text will do"
  end

  test "one whose server cannot be reached: host and port" do
    options = %{api_base: "http://127.0.0.1:1/v1", api_key: @key, connect_timeout: 1}
    text = "openai/x: 127.0.0.1:1 cannot be reached within 1 s: Connection refused"
    advice = "start its server, or correct api_base in :lm_options"
    assert check("openai/x", lm_options: options) == {:failed, text, advice}
  end

  @tag :slow
  test "a misspelt option: the nearest one" do
    assert {:failed, found, "correct :lm and :lm_options of the bridge"} =
             check("openai/x", lm_options: %{api_bas: "x"})

    assert found =~ "openai/x: it or its options are refused: lm_options.api_bas: unknown option"
    assert found =~ "did you mean api_base?"
  end

  @tag :slow
  test "one that DSPy refuses for another reason: its error text" do
    env = Map.new(~w(AZURE_OPENAI_RESOURCE AZURE_OPENAI_ENDPOINT AZURE_API_BASE), &{&1, ""})
    assert {:failed, found, advice} = check("azure/gpt-4", env: env)
    assert found =~ "DSPy will refuse it: " and found =~ "AZURE_OPENAI_RESOURCE"
    assert advice == "do as it says, in :lm_options"
  end

  test "one that needs no key passes, also where a folder has the name of DSPy", %{tmp_dir: dir} do
    File.mkdir_p!(Path.join(dir, "dspy"))
    File.write!(Path.join(dir, "dspy/__init__.py"), "raise SystemExit('the application\'s')")
    python = interpreter(dir, "cd #{dir} && exec #{python()} \"$@\"")

    assert check("ollama_chat/llama3", [], python) ==
             {:ok, "ollama_chat/llama3: needs no key", nil}
  end

  # LiteLLM takes seconds to import.
  @tag :slow
  test "of a provider that LiteLLM serves: without a key, with an empty one, with options, misspelt",
       %{tmp_dir: dir} do
    empty = interpreter(dir, "MISTRAL_API_KEY= exec #{python()} \"$@\"")
    azure = %{"AZURE_API_KEY" => "", "AZURE_API_BASE" => "", "AZURE_API_VERSION" => ""}
    {:ok, listening} = :gen_tcp.listen(0, ip: {127, 0, 0, 1})
    {:ok, port} = :inet.port(listening)
    options = %{api_key: @key, api_base: "http://127.0.0.1:#{port}", api_version: "2024"}

    cases = [
      fn -> check("mistral/x", [], empty) end,
      fn -> check("azure/x", env: azure, lm_options: options) end,
      fn -> check("opnai/gpt-4o") end
    ]

    results = Task.async_stream(cases, & &1.(), timeout: 60_000)

    assert [ok: mistral, ok: given, ok: misspelt] =
             Enum.to_list(results)

    assert {:failed, "mistral/x: its key is not set", advice} = mistral
    assert advice =~ "set MISTRAL_API_KEY"

    assert given ==
             {:ok, "azure/x: its key is set, in :lm_options or DSPY_BRIDGE_LM_OPTIONS", nil}

    assert {:failed, found, advice} = misspelt
    assert found == "opnai/gpt-4o: neither DSPy nor LiteLLM knows its provider"
    assert advice =~ "openai/gpt-4o-mini"
  end

  describe "that is asked" do
    # The script must be asked to ask.
    defp ask(dir, answer, model \\ "openai/x") do
      answer = JSON.encode!(%{asked: answer})
      python = interpreter(dir, "[ \"$2\" = --ask ] && echo 'DSPEX #{answer}'")
      {:ok, options} = Options.new(lm: model, lm_options: %{api_key: @key})
      {status, found, advice, _fact} = LM.ask(python, options)
      {status, found, advice}
    end

    test "and honours what is configured", %{tmp_dir: dir} do
      answer = %{ms: 12, response_schema: true, function_calling: false, supports: nil}

      assert ask(dir, answer) ==
               {:ok,
                "openai/x: answered in 12 ms; response schemas: honoured, function calls: not honoured",
                nil}
    end

    test "and honours something else: the line to add", %{tmp_dir: dir} do
      answer = %{ms: 12, response_schema: true, function_calling: true}
      answer = Map.put(answer, :supports, ["response_schema", "function_calling"])
      line = ~s(add to its :lm_options: supports: ["response_schema", "function_calling"])
      assert {:note, "openai/x: answered in 12 ms; " <> _honours, ^line} = ask(dir, answer)
    end

    test "and answers with an error: in one line, with what to do, without a key", %{tmp_dir: dir} do
      error = %{kind: "LMAuthError", error: "bad key #{@key}"}

      assert ask(dir, error) ==
               {:failed, "openai/x: it gave no answer: bad key [redacted]",
                "correct :lm, its key or :lm_options; or see the log of its server"}
    end

    test "or is not there", %{tmp_dir: dir} do
      assert ask(dir, %{}, "offline/echo") == {:note, "there is only offline/echo to ask", nil}
      assert ask(dir, %{}, nil) == {:note, "there is no LM to ask", nil}
    end
  end

  describe "with an interpreter that reports" do
    defp says(dir, answer), do: interpreter(dir, "echo 'DSPEX #{JSON.encode!(answer)}'")

    test "there is no such provider: the application's code may register it", %{tmp_dir: dir} do
      python = says(dir, %{engine: "litellm", known: false})
      env = %{"DSPY_BRIDGE_INIT" => "my.module:init"}
      assert {:note, found, nil} = check("mine/x", [env: env], python)
      assert found =~ "DSPY_BRIDGE_INIT may bring it"
    end

    test "a key is in the options: where", %{tmp_dir: dir} do
      python = says(dir, %{engine: "dspy", known: true, key: true, why: nil, lacks: [], set: []})
      text = "openai/x: its key is set, in :lm_options or DSPY_BRIDGE_LM_OPTIONS"
      assert check("openai/x", [lm_options: %{api_key: @key}], python) == {:ok, text, nil}
    end

    test "LiteLLM finds a key: which", %{tmp_dir: dir} do
      python = says(dir, %{engine: "litellm", known: true, lacks: [], set: ["MISTRAL_API_KEY"]})
      text = "mistral/x: its key is set, MISTRAL_API_KEY"
      assert check("mistral/x", [], python) == {:ok, text, nil}
    end

    test "LiteLLM misses an identity, which may be elsewhere: a note", %{tmp_dir: dir} do
      python = says(dir, %{engine: "litellm", known: true, lacks: ["AWS_ACCESS_KEY_ID"], set: []})
      text = "bedrock/x: not set: AWS_ACCESS_KEY_ID; it may find what it needs elsewhere"
      assert check("bedrock/x", [], python) == {:note, text, nil}
    end

    test "DSPy's error text, with a key in it: redacted", %{tmp_dir: dir} do
      python = says(dir, %{refused: "ValueError: no such key: #{@key}"})
      assert {:failed, found, _advice} = check("openai/x", [lm_options: %{api_key: @key}], python)

      assert found ==
               "openai/x: it or its options are refused: ValueError: no such key: [redacted]"
    end

    test "LiteLLM misses a key: your own server may need none", %{tmp_dir: dir} do
      python = says(dir, %{engine: "litellm", known: true, lacks: ["MISTRAL_API_KEY"], set: []})
      options = [lm_options: %{api_base: "http://127.0.0.1:1/v1"}]
      assert {:note, found, advice} = check("mistral/x", options, python)
      assert found =~ "which the server at its api_base may not need"
      assert advice =~ "any text will do"
    end

    test "no answer: failed, with the last line of output, without secrets", %{tmp_dir: dir} do
      python = interpreter(dir, "echo \"no dspy here: $SOME_API_KEY\" >&2; exit 1")

      assert {:failed, found, advice} =
               check("openai/x", [env: %{"SOME_API_KEY" => @key}], python)

      assert found =~
               "openai/x: could not find out whether its key is set: no dspy here: [redacted]"

      assert advice =~ "import dspy"
    end
  end
end
