defmodule DSPex.PythonBridge.HistoryTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO
  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, History}

  doctest History

  @entry %{
    "model" => "openai/gpt-4o-mini",
    "messages" => [
      %{"role" => "system", "content" => "Your input fields are:\n1. `question` (str)\n"},
      %{"role" => "user", "content" => "[[ ## question ## ]]\nWhy?"}
    ],
    "outputs" => ["[[ ## answer ## ]]\nBecause."],
    "finish_reason" => "stop",
    "usage" => %{"prompt_tokens" => 120, "completion_tokens" => 15, "total_tokens" => 135},
    "duration_ms" => 812.4,
    "cached" => false,
    "error" => nil
  }

  defp text(source), do: source |> History.format() |> IO.iodata_to_binary()

  test "shows each LM call under the headings of inspect_history" do
    assert text([@entry]) == """

           [openai/gpt-4o-mini, 120 + 15 tokens, 812 ms]

           System message:
           Your input fields are:
           1. `question` (str)

           User message:
           [[ ## question ## ]]
           Why?

           Response:
           [[ ## answer ## ]]
           Because.

           """
  end

  test "shows an answer that was cut off, an LM call that failed, and how many are omitted" do
    failed = %{@entry | "outputs" => [], "error" => "LMServerError: Oh", "finish_reason" => nil}

    text =
      text([
        %{@entry | "finish_reason" => "length", "cached" => true},
        %{"omitted" => 7},
        Map.delete(failed, "usage")
      ])

    assert text =~ "[openai/gpt-4o-mini, 120 + 15 tokens, 812 ms, cached, finish: length]\n"
    assert text =~ "\n[7 LM calls omitted]\n"
    assert text =~ "[openai/gpt-4o-mini, 812 ms]\n"
    assert text =~ "\nError:\nLMServerError: Oh\n"
    assert text([%{@entry | "messages" => nil}]) =~ "(messages left out)\n\nResponse:\n"
  end

  test "shows tool calls, further completions, and media without their data" do
    calls = [
      %{"function" => %{"name" => "search", "arguments" => ~s({"q":"red"})}},
      %{"name" => "count", "args" => %{"n" => 1}}
    ]

    parts = [
      %{"type" => "text", "text" => "What is this?"},
      %{"type" => "image_url", "image_url" => %{"url" => "data:image/png;base64,AAAABBBB"}},
      %{"type" => "image_url", "image_url" => %{"url" => "https://example.org/a.png"}},
      %{"type" => "input_audio", "input_audio" => %{"data" => "CCCCDDDD"}}
    ]

    text =
      text([
        %{
          @entry
          | "messages" => [
              %{"role" => "user", "content" => parts},
              %{"role" => "assistant", "content" => nil, "tool_calls" => calls}
            ],
            "outputs" => [%{"text" => "", "tool_calls" => calls}, %{"text" => "two"}]
        }
      ])

    assert text =~
             "What is this?\n<image_url, 73 characters>\n<image https://example.org/a.png>"

    assert text =~ ~r/<input_audio, \d+ characters>/
    refute text =~ "CCCC"
    assert text =~ ~s(Tool calls:\nsearch: {"q":"red"}\ncount: {"n":1}\n)
    assert text =~ "(and 1 more completions)"
    refute text =~ "Response:"
  end

  test "takes a meta, entries, a result or an error, and says if there is no history" do
    meta = %{"lm_calls" => 1, "history" => [@entry]}
    error = Error.from_peer("output_invalid", "no", nil, meta)
    shown = text([@entry])

    for source <- [meta, {:ok, %{}, meta}, error, {:error, error}],
        do: assert(text(source) == shown)

    for source <- [%{}, {:ok, %{}, %{}}, Error.new(:timeout), {:error, :timeout}, nil],
        do: assert(text(source) =~ "history: true")

    for source <- [[], %{"history" => []}], do: assert(text(source) == "no LM calls\n")
  end

  test "what an LM writes does not control the terminal" do
    text = text([%{@entry | "outputs" => ["\e]0;title\a\u009B31m tab\tand\r\nline"]}])
    assert text =~ ~S(\x1B]0;title\x07\x9B31m tab) <> "\tand\nline"
    refute text =~ ~r/[\e\a\r\x{9B}]/u
  end

  test "shows the calls of a run with the real peer, and of none that did not ask" do
    bridge = start_supervised!({Bridge, real_opts(default_timeout: 60_000)})
    create = %{id: "qa", signature: "question -> answer"}
    {:ok, _} = Bridge.call(bridge, :create_program, create)
    args = %{program_id: "qa", inputs: %{question: "Why is the sky blue?"}}

    assert {:ok, _, %{"history" => [_call]}} =
             result = Bridge.request(bridge, :execute_program, args, history: true)

    text = text(result)
    assert capture_io(fn -> assert History.print(result) == :ok end) == text

    for part <- ["[offline/echo", "System message:\n", "User message:\n", "Response:\n"],
        do: assert(text =~ part)

    assert text =~ "Why is the sky blue?"
    assert text(Bridge.request(bridge, :execute_program, args, [])) =~ "history: true"
  end

  @tag :capture_log
  test "of keys and prompts, nothing is kept by a bridge once the calls have ended" do
    planted = ["sk-planted-default", "sk-planted-program", "sk-planted-call", "planted question"]
    [default, program, call, question] = planted
    opts = real_opts(lm_options: %{api_key: default}, default_timeout: 60_000)
    bridge = start_supervised!({Bridge, opts})
    lm = &%{model: "offline/echo", api_key: &1}
    create = %{id: "qa", signature: "question -> answer", lm: lm.(program)}
    {:ok, _} = Bridge.call(bridge, :create_program, create)

    for args <- [%{}, %{lm: lm.(call)}, %{inputs: %{qestion: question}}] do
      args = Map.merge(%{program_id: "qa", inputs: %{question: question}}, args)
      Bridge.request(bridge, :execute_program, args, history: true)
      Bridge.request(bridge, :execute_program, args, timeout: 0)
    end

    {:ok, _} = Bridge.call(bridge, :ping)
    kept = inspect(:sys.get_state(bridge), limit: :infinity, printable_limit: :infinity)
    for secret <- planted, do: refute(kept =~ secret)
  end
end
