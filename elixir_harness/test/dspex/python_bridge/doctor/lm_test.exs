defmodule DSPex.PythonBridge.Doctor.LMTest do
  # What DSPy and LiteLLM really say is in tests/root/test_check_lm.py; here an interpreter reports it.
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Doctor.LM
  alias DSPex.PythonBridge.Options

  @moduletag :tmp_dir

  @key "sk-0123456789abcdef"
  @unset ~w(DSPY_BRIDGE_LM OPENAI_API_KEY GEMINI_API_KEY GOOGLE_API_KEY MISTRAL_API_KEY)

  # Nobody's keys but those of the test.
  defp check(python, model, opts, check \\ &LM.check/2) do
    env = Map.merge(Map.new(@unset, &{&1, ""}), Keyword.get(opts, :env, %{}))
    {:ok, options} = Options.new([lm: model] ++ Keyword.put(opts, :env, env))
    {status, found, advice, _fact} = check.(python, options)
    refute "#{found}#{advice}" =~ @key
    {status, found, advice}
  end

  test "none configured is a note, with the line for it; one that is built in passes" do
    assert {:note, "config :dspex, :python_bridge has no default LM", advice} =
             check(python(), nil, [])

    assert advice =~ "config :dspex, :python_bridge, lm: "
    assert {:ok, "offline/echo" <> _more, nil} = check(python(), "offline/echo", [])
  end

  test "for real: one that lacks its key, one that needs none, one whose server is not there" do
    assert {:failed, "gemini/x: its key is not set", advice} = check(python(), "gemini/x", [])
    assert advice =~ "set GEMINI_API_KEY or GOOGLE_API_KEY in the environment of the BEAM"
    assert {:ok, "ollama_chat/x: needs no key", nil} = check(python(), "ollama_chat/x", [])
    options = %{api_base: "http://127.0.0.1:1/v1", api_key: @key, connect_timeout: 1}
    text = "openai/x: 127.0.0.1:1 cannot be reached within 1 s: Connection refused"
    advice = "start its server, or correct api_base in :lm_options"
    assert check(python(), "openai/x", lm_options: options) == {:failed, text, advice}
  end

  @given [lm_options: %{api_key: @key}]
  @init [env: %{"DSPY_BRIDGE_INIT" => "my.module:init"}]
  @address [lm_options: %{api_base: "http://127.0.0.1:1/v1"}]

  for {facts, opts, status, found} <- [
        {%{lacks: [], set: []}, @given, :ok,
         "its key is set, in :lm_options or DSPY_BRIDGE_LM_OPTIONS"},
        {%{lacks: [], set: ["X_API_KEY"]}, [], :ok, "its key is set, X_API_KEY"},
        {%{lacks: [], set: []}, [], :ok, "no variable is known that it needs"},
        {%{lacks: ["X_API_KEY"], why: "no key"}, @address, :failed, "its key is not set"},
        {%{lacks: ["X_API_KEY"]}, @address, :note,
         "its key is not set, which the server at its api_base may not need"},
        {%{lacks: ["AWS_ACCESS_KEY_ID"]}, [], :note,
         "not set: AWS_ACCESS_KEY_ID; it may find what it needs elsewhere"},
        {%{lacks: [], why: "no RESOURCE"}, [], :failed, "DSPy will refuse it: no RESOURCE"},
        {%{known: false}, [], :failed, "neither DSPy nor LiteLLM knows its provider"},
        {%{known: false}, @init, :note,
         "its provider is not known; DSPY_BRIDGE_INIT may bring it"},
        {%{lacking: "no LiteLLM"}, [], :failed, "no LiteLLM"},
        {%{refused: "no such key: #{@key}"}, @given, :failed,
         "it or its options are refused: no such key: [redacted]"},
        {%{asked: %{error: "bad key #{@key}"}}, @given, :failed,
         "it gave no answer: bad key [redacted]"},
        {%{asked: %{ms: 12, response_schema: true, function_calling: false}}, @given, :ok,
         "answered in 12 ms; response schemas: honoured, function calls: not honoured"}
      ] do
    @facts facts
    @opts opts
    @status status
    @found found

    test "#{inspect(facts)} with #{inspect(Keyword.keys(opts))}", %{tmp_dir: dir} do
      python = interpreter(dir, "echo 'DSPEX #{JSON.encode!(@facts)}'")
      assert {@status, "x/y: " <> @found, advice} = check(python, "x/y", @opts)
      assert advice == nil == (@status == :ok or (@status == :note and @opts != @address))
    end
  end

  test "that is asked and honours what is not configured: the line to add", %{tmp_dir: dir} do
    answer = %{
      ms: 12,
      response_schema: true,
      function_calling: true,
      supports: ["response_schema"]
    }

    # The script must be asked to ask.
    script = ~s([ "$2" = --ask ] && echo 'DSPEX #{JSON.encode!(%{asked: answer})}')
    line = ~s(add to its :lm_options: supports: ["response_schema"])
    assert {:note, _found, ^line} = check(interpreter(dir, script), "x/y", [], &LM.ask/2)
    assert {:note, "there is no LM to ask", nil} = check(python(), nil, [], &LM.ask/2)
  end

  test "no answer: failed, with the last line of output, without secrets", %{tmp_dir: dir} do
    python = interpreter(dir, "echo \"no dspy here: $SOME_API_KEY\" >&2; exit 1")
    assert {:failed, found, advice} = check(python, "x/y", env: %{"SOME_API_KEY" => @key})
    assert found == "x/y: could not find out whether its key is set: no dspy here: [redacted]"
    assert advice =~ "import dspy"
  end
end
