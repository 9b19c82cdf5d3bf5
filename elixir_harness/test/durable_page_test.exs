defmodule MyApp.Tickets do
  @moduledoc "The page's application: its table, and its provider of payments, which tells the test."

  def question(id), do: "Where is the order of ticket #{id}?"
  def history(id), do: get({:history, id}, [])
  def put_history(id, history), do: put({:history, id}, history)
  def put_answer(id, answer), do: put({:answer, id}, answer)
  def get(key, default \\ nil), do: :ets.lookup_element(__MODULE__, key, 2, default)
  def put(key, value), do: :ets.insert(__MODULE__, {key, value}) && :ok
end

defmodule MyApp.Billing do
  def pay_back(%{"order" => order}, call_key) do
    send(MyApp.Tickets.get(:test), {:paid, order, call_key, self()})
    if MyApp.Tickets.get(:slow), do: receive(do: (:go -> :ok))
    {:ok, %{state: "paid back"}}
  end
end

defmodule DSPex.DurablePageTest do
  @moduledoc "Runs docs/guide/durable.md with the real peer; stand-ins take the place of Oban, LiveView and Ecto."

  # The application's store is configured.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Durable, Pool}
  alias DSPex.PythonBridge.Durable.{FileStore, Run}
  alias DSPex.Test.{LiveViewStandIn, Page, StoreContract}
  alias DSPex.Test.Telemetry, as: Host
  alias MyApp.Tickets

  @page "docs/guide/durable.md"
  @external_resource Page.path(@page)
  @pool __MODULE__.Pool
  @support MyApp.Support
  @store MyApp.RunStore
  # They are compiled with the page.
  @compile {:no_warn_undefined, [@support, @store, MyApp.SupportWorker]}

  setup_all do
    others = Page.compile(@page, @pool)
    start_supervised!({Pool, real_opts(name: @pool, pool_size: 1, programs: [@support])})
    %{others: others}
  end

  @moduletag :tmp_dir
  @moduletag timeout: 120_000
  setup %{tmp_dir: dir} do
    put_config(:durable, store: {FileStore, dir})
    :ets.new(Tickets, [:named_table, :public])
    Tickets.put(:test, self())
  end

  defp run(id) do
    {:ok, runs} = Durable.list()
    Enum.find(runs, &(&1.id == id))
  end

  test "its runs do what it says", %{others: others} do
    Host.install()
    on_exit(&Host.remove/0)
    Host.attach(for event <- [:suspended, :resumed, :diverged], do: [:durable, event])
    # The process of one was killed while its tool was at work.
    Tickets.put(:slow, true)
    {:suspended, run} = @support.durable(%{question: "My order 7 has not come."}, id: "ticket-11")
    opts = [id: "ticket-11", approve: hd(run.waiting).key]
    pid = spawn(fn -> @support.durable(:resume, opts) end)
    assert_receive {:paid, _order, _key, _tool}, 30_000
    Process.exit(pid, :kill)
    eventually(fn -> run("ticket-11").state == :interrupted end)
    Tickets.put(:slow, false)

    Page.run(Enum.join(others, "\n"), @page)
    assert {:ok, [_ | _] = runs} = Durable.list()
    assert for(run <- runs, run.state != :done, do: run.id) == []

    about = %{server: @pool, run_id: "ticket-13", program_id: "MyApp.Support"}
    events = for {[:durable, event], %{count: 1}, ^about} <- Host.events(), do: event
    assert events == [:suspended, :resumed, :diverged]
  end

  # A struct of a module that is compiled when the test runs.
  defp perform(args), do: MyApp.SupportWorker.perform(struct!(Oban.Job, id: 7, args: args))

  test "the job waits for the approval, pays once, and goes on where it was" do
    job = %{"ticket" => "1"}
    assert perform(job) == :ok
    assert %Run{state: :suspended, waiting: [%{key: key}]} = run("ticket-1")
    Tickets.put(:slow, true)
    approved = Map.put(job, "approve", key)
    task = Task.async(fn -> perform(approved) end)
    assert_receive {:paid, _order, ^key, tool}, 30_000
    assert perform(approved) == {:snooze, 30}
    send(tool, :go)
    assert Task.await(task) == :ok
    assert Tickets.get({:answer, "1"}) =~ "ticket 1"
    assert perform(approved) == :ok
    refute_received {:paid, _order, _key, _tool}
  end

  defp open do
    {:ok, view} = LiveViewStandIn.open(MyAppWeb.SupportLive, %{"ticket" => "1"})
    on_exit(fn -> Process.exit(view, :kill) end)
    view
  end

  defp shows(view, state),
    do: eventually(fn -> (a = LiveViewStandIn.assigns(view)).state == state && a end, 30_000)

  test "the chat waits for the approval, also in its next view, and goes on after it" do
    view = open()
    shows(view, :ready)
    LiveViewStandIn.event(view, "ask", %{"question" => "Where is it?"})
    assert %{waiting: [%{key: key, why: "approve"}]} = shows(view, :waiting)
    LiveViewStandIn.leave(view)

    view = open()
    assert %{waiting: [%{key: ^key}], history: []} = shows(view, :waiting)
    Tickets.put(:slow, true)
    LiveViewStandIn.event(view, "approve", %{"key" => key})
    assert_receive {:paid, _order, ^key, tool}, 30_000
    other = open()
    shows(other, :failed)
    send(tool, :go)
    assert %{history: [%{"question" => "Where is it?"} | _] = history} = shows(view, :ready)
    LiveViewStandIn.event(other, "again")
    assert %{history: ^history} = shows(other, :ready)
    LiveViewStandIn.event(other, "ask", %{"question" => "And now?"})
    assert %{waiting: [%{key: next}]} = shows(other, :waiting)
    assert next != key
  end

  test "the store of the database keeps what stores promise" do
    start_supervised!({MyApp.Repo, python()})
    [tables] = Page.blocks(@page, "sql")
    for sql <- String.split(tables, ";\n", trim: true), do: MyApp.Repo.query!(sql, [])
    opts = [id: "t", store: @store]
    assert {:suspended, %Run{waiting: [call]}} = @support.durable(%{question: "Why?"}, opts)
    assert {:ok, _} = @support.durable(:resume, [approve: call.key] ++ opts)
    assert {:ok, [%Run{id: "t", state: :done}]} = Durable.list(store: @store)
    assert :ok = Durable.delete("t", store: @store)
    StoreContract.check(@store, nil)
    # The lease of an owner that has died is over.
    assert :ok = @store.claim(nil, "s", "dead", -1)
    assert :ok = @store.claim(nil, "s", "next", 1_000)
    assert {:error, :claimed} = @store.append(nil, "s", "dead", "late")
  end
end
