defmodule DSPex.PythonBridge.Doctor.LMTest do
  # What DSPy and LiteLLM really say, but for the last ones. No request is made.
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Doctor.LM
  alias DSPex.PythonBridge.Options

  @moduletag :tmp_dir

  @key "sk-0123456789abcdef"
  @unset ~w(DSPY_BRIDGE_LM OPENAI_API_KEY GEMINI_API_KEY GOOGLE_API_KEY MISTRAL_API_KEY AWS_ACCESS_KEY_ID
            AWS_SECRET_ACCESS_KEY AWS_PROFILE AWS_ROLE_ARN)

  # Nobody's keys but those of the test.
  defp check(model, opts \\ [], python \\ python()) do
    env = Map.merge(Map.new(@unset, &{&1, ""}), Keyword.get(opts, :env, %{}))
    {:ok, options} = Options.new([lm: model] ++ Keyword.put(opts, :env, env))
    {status, found, advice, _fact} = LM.check(python, options)
    refute "#{found}#{advice}" =~ @key
    {status, found, advice}
  end

  # An interpreter that is a shell script.
  defp interpreter(dir, script) do
    path = Path.join(dir, "python3")
    File.write!(path, "#!/bin/sh\n" <> script)
    File.chmod!(path, 0o755)
    path
  end

  test "none configured is a note, with the line for it" do
    assert {:note, "no default LM is configured", advice} = check(nil)
    assert advice =~ "config :dspex, :python_bridge, lm: "
  end

  test "one that has its key: where, never its value" do
    env = %{"OPENAI_API_KEY" => @key}

    assert check("openai/gpt-4o-mini", env: env) ==
             {:ok, "openai/gpt-4o-mini: its key is set, OPENAI_API_KEY", nil}

    options = [lm_options: %{api_key: @key, model: "another"}]
    text = "openai/gpt-4o-mini: its key is set, in :lm_options or DSPY_BRIDGE_LM_OPTIONS"
    assert check("openai/gpt-4o-mini", options) == {:ok, text, nil}
  end

  test "one that lacks its key fails: which variables would do" do
    assert {:failed, "gemini/x: its key is not set", advice} = check("gemini/x")
    assert advice =~ "set GEMINI_API_KEY or GOOGLE_API_KEY in the environment of the BEAM"
    assert advice =~ "or api_key in :lm_options"
  end

  test "one that needs no key is well" do
    assert check("ollama_chat/llama3") == {:ok, "ollama_chat/llama3: needs no key", nil}
    assert {:ok, "offline/echo" <> _more, nil} = check("offline/echo")
  end

  test "one at an address of one's own without a key fails where DSPy refuses each call without one" do
    assert {:failed, found, advice} =
             check("openai/x", lm_options: %{api_base: "http://[::1]/v1"})

    assert found == "openai/x: its key is not set"
    assert advice =~ "for a server that needs none, any text will do"
  end

  test "one that DSPy refuses for another reason: its own words" do
    env = Map.new(~w(AZURE_OPENAI_RESOURCE AZURE_OPENAI_ENDPOINT AZURE_API_BASE), &{&1, ""})
    assert {:failed, found, _advice} = check("azure/gpt-4", env: env)
    assert found =~ "DSPy will refuse it: " and found =~ "AZURE_OPENAI_RESOURCE"
  end

  describe "of a provider that LiteLLM serves" do
    test "with and without its key; an empty variable is none", %{tmp_dir: dir} do
      assert check("mistral/x", env: %{"MISTRAL_API_KEY" => @key}) ==
               {:ok, "mistral/x: its key is set, MISTRAL_API_KEY", nil}

      python = interpreter(dir, "MISTRAL_API_KEY= exec #{python()} \"$@\"")
      assert {:failed, "mistral/x: its key is not set", advice} = check("mistral/x", [], python)
      assert advice =~ "set MISTRAL_API_KEY"
    end

    test "that may find an identity elsewhere: a note" do
      assert {:note, found, nil} = check("bedrock/anthropic.claude")
      assert found =~ "AWS_ACCESS_KEY_ID"
    end

    test "that there is not, as it is misspelt" do
      assert {:failed, found, advice} = check("opnai/gpt-4o")
      assert found == "opnai/gpt-4o: neither DSPy nor LiteLLM knows its provider"
      assert advice =~ "openai/gpt-4o-mini"
    end
  end

  describe "with an interpreter that says" do
    defp says(dir, answer), do: interpreter(dir, "echo 'DSPEX #{JSON.encode!(answer)}'")

    test "there is no such provider: the host's code may bring it", %{tmp_dir: dir} do
      python = says(dir, %{engine: "litellm", known: false})
      env = %{"DSPY_BRIDGE_INIT" => "my.module:init"}
      assert {:note, found, nil} = check("mine/x", [env: env], python)
      assert found =~ "DSPY_BRIDGE_INIT may bring it"
    end

    test "LiteLLM misses a key: a server of one's own may need none", %{tmp_dir: dir} do
      python = says(dir, %{engine: "litellm", known: true, lacks: ["MISTRAL_API_KEY"], set: []})
      options = [lm_options: %{api_base: "http://127.0.0.1:1/v1"}]
      assert {:note, found, advice} = check("mistral/x", options, python)
      assert found =~ "which the server at its api_base may not need"
      assert advice =~ "any text will do"
    end

    test "nothing of it: a note with its last line, secrets aside", %{tmp_dir: dir} do
      python = interpreter(dir, "echo \"no dspy here: $SOME_API_KEY\" >&2; exit 1")
      assert {:note, found, nil} = check("openai/x", [env: %{"SOME_API_KEY" => @key}], python)

      assert found =~
               "openai/x: whether its key is set could not be told: no dspy here: [redacted]"
    end
  end
end
