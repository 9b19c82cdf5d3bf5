defmodule MyApp.Documents do
  @moduledoc "The documents of the page's application."

  def start(texts) do
    ExUnit.Callbacks.start_supervised!(%{
      id: __MODULE__,
      start: {Agent, :start_link, [fn -> texts end, [name: __MODULE__]]}
    })
  end

  def fetch(id), do: Agent.get(__MODULE__, &Map.fetch(&1, id))

  def put_summary(id, summary),
    do: Agent.update(__MODULE__, &put_in(&1[id].summary, summary))
end

defmodule MyApp.Payments do
  @moduledoc "Its provider of payments, which tells the test."

  def refund(order, opts) do
    {test, meanwhile} = Application.fetch_env!(:dspex, :test_payments)
    send(test, {:refund, order, opts[:idempotency_key]})
    meanwhile.()
    {:ok, %{order: order, state: "paid back"}}
  end
end

defmodule DSPex.JobsPageTest do
  @moduledoc "The workers of docs/guide/jobs.md with the real peer; a stand-in takes the place of Oban."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Error, Pool, Stub}
  alias DSPex.Test.{Page, SilentLM}

  @page "docs/guide/jobs.md"
  @external_resource Page.path(@page)
  @pool __MODULE__.Pool
  @summary MyApp.SummaryWorker
  @complaint MyApp.ComplaintWorker
  # They are compiled with the page.
  @compile {:no_warn_undefined, [@summary, @complaint, MyApp.Summary]}

  setup_all do
    %{others: Page.compile(@page, @pool)}
  end

  setup do
    MyApp.Documents.start(%{1 => %{id: 1, text: "Long.", summary: nil}})
    :ok
  end

  defp start_pool(opts) do
    programs = [MyApp.Summary, MyApp.Complaint]
    opts = [name: @pool, python_executable: python(), pool_size: 1, programs: programs] ++ opts
    start_supervised!({Pool, opts})
  end

  # Structs of modules that are compiled when the test runs.
  defp job(args), do: struct!(Oban.Job, id: 7, args: args)

  defp summarize(id), do: @summary.perform(job(%{"document_id" => id}))

  test "a document is summarized once" do
    start_pool(lm: "offline/script", lm_options: %{answers: [%{summary: "Short."}]})
    assert summarize(1) == :ok
    assert {:ok, %{summary: "Short."}} = MyApp.Documents.fetch(1)
    # The LM has no second answer.
    assert summarize(1) == :ok
    assert {:cancel, "document 2 is gone"} = summarize(2)
  end

  test "the process of a job that Oban kills ends the LM's request" do
    start_pool(SilentLM.lm_opts(SilentLM.start()))
    pid = spawn(fn -> summarize(1) end)
    assert_receive {:lm_request, _line}, 30_000
    Process.exit(pid, :kill)
    assert_receive :lm_closed, 10_000
    [ms] = Regex.run(~r/timeout: ([\d_]+)/, File.read!(Page.path(@page)), capture: :all_but_first)
    assert @summary.timeout(job(%{})) > ms |> String.replace("_", "") |> String.to_integer()
  end

  test "each type of error has the outcome of the page's table" do
    assert {:error, "the bridge DSPex.JobsPageTest.Pool is not running"} = summarize(1)
    start_supervised!({Stub, name: @pool})
    {:ok, types} = Code.Typespec.fetch_types(Error)
    [atoms] = for {:type, {:type, {:type, _, :union, atoms}, []}} <- types, do: atoms

    for {:atom, _, type} when type != :bridge_not_running <- atoms, retryable <- [true, false] do
      Stub.expect(@pool, MyApp.Summary, 2, fn _inputs ->
        {:error, %Error{type: type, message: "why", retryable: retryable}}
      end)

      # Some have a text and a `retryable` of their own, whatever an answer says.
      {:error, %Error{type: ^type, message: text} = error} = MyApp.Summary.run(%{text: "Long."})

      case summarize(1) do
        {:snooze, s} ->
          assert match?(%{type: :overloaded, retryable: true}, error) and s in 20..40

        {:error, ^text} ->
          assert error.retryable or type == :timeout

        {:cancel, ^text} ->
          assert not error.retryable and type != :timeout
      end
    end
  end

  test "a refund has the same key in each attempt of a job" do
    Application.put_env(:dspex, :test_payments, {self(), fn -> :ok end})
    on_exit(fn -> Application.delete_env(:dspex, :test_payments) end)

    step = %{next_tool_name: "refund", next_tool_args: %{order: "A1"}}
    answers = [step, %{next_tool_name: "finish"}, %{reply: "Done."}]
    start_pool(lm: "offline/script", lm_options: %{answers: answers ++ answers})

    for _attempt <- 1..2 do
      assert @complaint.perform(job(%{"complaint" => "It is broken."})) == :ok
      assert_received {:refund, "A1", "job-7-order-A1"}
    end
  end

  @tag :capture_log
  test "a Python that dies once the refund has begun cancels the job" do
    kill = fn -> for %{os_pid: os_pid} <- Pool.status(@pool).peers, do: kill(os_pid) end
    Application.put_env(:dspex, :test_payments, {self(), kill})
    on_exit(fn -> Application.delete_env(:dspex, :test_payments) end)
    step = %{next_tool_name: "refund", next_tool_args: %{order: "A1"}}
    start_pool(lm: "offline/script", lm_options: %{answers: [step]})

    assert {:cancel, "the Python process was lost" <> _} =
             @complaint.perform(job(%{"complaint" => "It is broken."}))

    assert_received {:refund, "A1", "job-7-order-A1"}
    refute_received {:refund, _order, _key}
  end
end
