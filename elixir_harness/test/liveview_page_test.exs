defmodule DSPex.LiveviewPageTest do
  @moduledoc "The views of docs/guide/liveview.md with the real peer; a stand-in takes the place of LiveView."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Pool, Stub}
  alias DSPex.PythonBridge.Pool.Handle
  alias DSPex.Test.{LiveViewStandIn, Page, SilentLM, StreamingLM}

  @page "docs/guide/liveview.md"
  @external_resource Page.path(@page)
  @pool __MODULE__.Pool
  @advice MyAppWeb.AdviceLive

  setup_all do
    %{others: Page.compile(@page, @pool)}
  end

  defp start_pool(opts) do
    opts =
      [name: @pool, python_executable: python(), pool_size: 1] ++
        [programs: [MyApp.Advice, MyApp.Chat]] ++ opts

    # On a busy machine that of the last test may still be ending.
    names = [@pool, Handle.bridges_supervisor(@pool)]
    eventually(fn -> Enum.all?(names, &(Process.whereis(&1) == nil)) end, 20_000)
    start_supervised!({Pool, opts})
  end

  # Its LM writes what the test has it write.
  defp start_streaming, do: start_pool(SilentLM.lm_opts(StreamingLM.start()))

  defp start_scripted(answers),
    do: start_pool(lm: "offline/script", lm_options: %{answers: answers})

  defp open(view, params \\ %{}) do
    {:ok, pid} = LiveViewStandIn.open(view, params)
    on_exit(fn -> Process.exit(pid, :kill) end)
    pid
  end

  defp ask(view, question) do
    :ok = LiveViewStandIn.event(view, "ask", %{"question" => question})
    assert_receive {:lm_request, lm}, 30_000
    StreamingLM.say(lm, "[[ ## reasoning ## ]]\nIt is late.\n\n[[ ## answer ## ]]\n")
    lm
  end

  defp end_answer(lm) do
    StreamingLM.say(lm, "\n\n[[ ## completed ## ]]")
    StreamingLM.finish(lm)
  end

  # Once the view has come to this.
  defp shows(view, wanted) do
    eventually(
      fn -> match?(^wanted, Map.take(LiveViewStandIn.assigns(view), Map.keys(wanted))) end,
      10_000
    )
  end

  test "the answer grows while the LM writes it" do
    start_streaming()
    view = open(@advice)
    lm = ask(view, "Tea?")
    StreamingLM.say(lm, "Green ")
    StreamingLM.say(lm, "tea, ")
    shows(view, %{answer: "Green tea,", asking?: true})
    StreamingLM.say(lm, "please.")
    end_answer(lm)
    shows(view, %{answer: "Green tea, please.", asking?: false, error: nil})
  end

  test "leaving the page closes the LM's request" do
    start_streaming()
    view = open(@advice)
    lm = ask(view, "Tea?")
    LiveViewStandIn.leave(view)
    assert_receive {:lm_closed, ^lm}, 10_000
  end

  test "an error is shown, and logged without what an answer said" do
    start_scripted(["Private nonsense.", "Private nonsense."])
    view = open(@advice)

    log =
      capture_log(fn ->
        :ok = LiveViewStandIn.event(view, "ask", %{"question" => "Tea?"})
        shows(view, %{asking?: false, error: "That did not work."})
      end)

    assert log =~ "advice: output_invalid"
    refute log =~ "Private"
  end

  test "a view without a stream has the result, or the error" do
    start_scripted([%{answer: "Green tea."}, "?", "?"])
    view = open(MyAppWeb.TeamLive, %{"question" => "Tea?"})

    eventually(
      fn -> match?({:ok, %{answer: "Green tea."}}, LiveViewStandIn.assigns(view).advice) end,
      30_000
    )

    view = open(MyAppWeb.TeamLive, %{"question" => "Tea?"})

    eventually(fn ->
      match?({:failed, %{type: :output_invalid}}, LiveViewStandIn.assigns(view).advice)
    end)
  end

  test "a chat goes on, also after an error" do
    # An answer that does not fit is asked for again, in JSON.
    start_scripted([%{answer: "An author."}, "?", "?", %{answer: "In 1775."}])
    turns = for {q, a} <- [{"Who?", "An author."}, {"When?", "In 1775."}], do: turn(q, a)
    view = open(MyAppWeb.ChatLive)
    say(view, "Who?", %{history: Enum.take(turns, 1), asking: nil, error: nil})
    say(view, "When?", %{history: Enum.take(turns, 1), asking: nil, error: "That did not work."})
    say(view, "When?", %{history: turns, asking: nil, error: nil})
  end

  defp turn(question, answer), do: %{"question" => question, "answer" => answer}

  defp say(view, question, wanted) do
    :ok = LiveViewStandIn.event(view, "ask", %{"question" => question})
    shows(view, wanted)
  end

  test "its tests need no Python", %{others: [code]} do
    Page.run(code, @page)

    Stub.expect(@pool, MyApp.Advice, fn %{"question" => "Coffee?"} ->
      Stub.chunk("answer", "Black.")
      {:ok, %{reasoning: "It is early.", answer: "Black."}}
    end)

    view = open(@advice)
    :ok = LiveViewStandIn.event(view, "ask", %{"question" => "Coffee?"})
    shows(view, %{answer: "Black.", asking?: false, error: nil})
  end
end
