//! Frames as they are seen.

use expect_test::{Expect, expect};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use serde_json::{Value, json};

use super::view::Key;
use super::*;

/// A window in which everything depends on its number.
fn window(number: u64) -> Value {
    let load = 1.0 + (number % 10) as f64;
    json!({"number": number, "backend": 3, "end_unix_ms": 1_790_000_000_000_u64, "span_ms": 10_000.0, "values": {
        "arrivals_per_s": 1_200.0 * load, "completions_per_s": 1_234.0 * load, "bytes_per_s": 5_000_000.0 * load,
        "depth_mean": load * 1.5, "latency_p50_us": 95.0 * load, "latency_p99_us": 410.0 * load,
        "latency_max_us": 2_500.0 * load, "errors_per_s": 0.0, "cpu_cores": 0.07 * load, "rss_bytes": 35_651_584.0,
        "oldest_age_us": 812.0, "read_share": 0.7, "ring_used_share": 0.12, "latency_samples": 420,
    }})
}

fn status(state: &str) -> Value {
    json!({
        "name": "disk0", "type": "blk", "socket": "/run/disk0.sock", "state": state, "vmm": "connected", "phase": "idle",
        "recovery_level": "exact", "fence_level": "reaped",
        "primary": {"pid": 1234, "generation": 3, "state": "active"},
        "shadow": {"pid": 1240, "generation": 4, "state": "ready"},
        "shadow_wanted": true, "shadow_note": "ready",
        "rings": [{"index": 0, "size": 256, "inflight": 7, "observer": "exact"}],
        "failovers": {"settled": 2, "refused": 0, "halted": 0},
        "last_failover": {"kind": "planned", "cause": "a new version", "result": "settled", "seconds_ago": 70,
            "blackout_us": 812.5},
    })
}

fn profile() -> Value {
    json!({"device": "disk0", "schema_version": 1, "windows": (0..25).map(window).collect::<Vec<_>>(), "records_lost": 0,
        "tick": {"values": {}}})
}

fn devices() -> Vec<Device> {
    let mut busy = Device::read("disk0", &status("protected"), Some(&profile()));
    busy.events = vec!["10:11:12.123 ShadowReady generation=4".to_owned()];
    let mut without = status("unprotected");
    without["shadow"] = Value::Null;
    without["shadow_note"] = json!("it ended with exit status: 7; the next start is in 2 s");
    vec![
        Device::read("disk1", &without, None),
        busy,
        Device::absent("gone", "dead", "no broker answers: it ended without cleaning up"),
    ]
}

/// Draws what is seen after these keys.
fn frame(devices: &[Device], keys: &[Key], (width, height): (u16, u16)) -> String {
    let mut known = Known::default();
    for device in devices {
        known.take(device.clone(), Instant::now());
    }
    let mut view = View::new(Page::List);
    for key in keys {
        let shown: Vec<&str> = known.shown(&view).iter().map(|device| device.name.as_str()).collect();
        assert!(view.key(*key, &shown));
    }
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("it cannot fail");
    let scene = Scene { devices: known.shown(&view), view: &view, dir: Path::new("/run/warmswap") };
    terminal
        .draw(|frame| {
            let (area, buffer) = (frame.area(), frame.buffer_mut());
            draw(&scene, area, buffer);
        })
        .expect("it cannot fail");
    text(terminal.backend().buffer()).iter().map(|line| format!("{line}\n")).collect()
}

#[track_caller]
fn check(devices: &[Device], keys: &[Key], size: (u16, u16), expected: &Expect) {
    expected.assert_eq(&frame(devices, keys, size));
}

#[test]
fn list() {
    check(
        &devices(),
        &[],
        (168, 12),
        &expect![[r#"
             warmswap top  3 devices, 1 protected, 1 warning, 1 error  /run/warmswap
            ▾DEVICE STATE         PRIMARY SHADOW       REQ/S  BYTES/S DEPTH     P50     P99     MAX ERR/S   CPU   MEMORY  OLDEST  RISK                REQ ▂▅█                P99 ▂▅█
            disk0   protected        1234 ready        6.2 k   24 MiB   7.5  475 us 2.05 ms 12.5 ms     0  0.35   34 MiB  812 us     - ▄▅▅▆▇▇█▂▂▃▄▅▅▆▇▇█▂▂▃▄▅ ▄▅▅▆▇▇█▂▂▃▄▅▅▆▇▇█▂▂▃▄▅
            disk1   unprotected      1234 -                -        -     -       -       -       -     -     -        -       -     -
            gone    dead                - -                -        -     -       -       -       -     -     -        -       -     -






             q quit  ? help  ↑↓ select  Enter open  s sort (by device)
        "#]],
    );
}

#[test]
fn list_of_80_columns_with_an_unprotected_device_selected() {
    check(
        &devices(),
        &[Key::Down, Key::Sort, Key::Sort],
        (80, 12),
        &expect![[r#"
             warmswap top  3 devices, 1 protected, 1 warning, 1 error  /run/warmswap
            DEVICE  STATE        ▾REQ/S  BYTES/S DEPTH     P99 ERR/S   CPU   MEMORY  REQ ▂▅█
            disk0   protected     6.2 k   24 MiB   7.5 2.05 ms     0  0.35   34 MiB ▇▇█▂▂▃▄▅
            disk1   unprotected       -        -     -       -     -     -        -
            gone    dead              -        -     -       -     -     -        -




            disk1: shadow: it ended with exit status: 7; the next start is in 2 s
            disk1: no profile: this broker keeps none
             q quit  ? help  ↑↓ select  Enter open  s sort (by req/s)
        "#]],
    );
}

#[test]
fn list_in_a_small_terminal_with_a_dead_broker_selected() {
    check(
        &devices(),
        &[Key::Last],
        (60, 15),
        &expect![[r#"
             warmswap top  3 devices, 1 protected, 1 warning, 1 error  …
            ▾DEVICE STATE         REQ/S     P99 ERR/S   CPU   MEMORY
            disk0   protected     6.2 k 2.05 ms     0  0.35   34 MiB
            disk1   unprotected       -       -     -     -        -
            gone    dead              -       -     -     -        -








            gone: no broker answers: it ended without cleaning up
             q quit  ? help  ↑↓ select  Enter open  s sort (by device)
        "#]],
    );
}

#[test]
fn no_devices() {
    check(
        &[],
        &[],
        (60, 8),
        &expect![[r#"
             warmswap top  0 devices  /run/warmswap
            ▾DEVICE STATE         REQ/S     P99 ERR/S   CPU   MEMORY




            no device is guarded here
             q quit  ? help  ↑↓ select  Enter open  s sort (by device)
        "#]],
    );
}

#[test]
fn device_page() {
    check(
        &devices(),
        &[Key::Enter],
        (120, 62),
        &expect![[r#"
             warmswap top  3 devices, 1 protected, 1 warning, 1 error  /run/warmswap
            disk0  protected  risk -
            device    blk, VMM connected, socket /run/disk0.sock
            primary   active, process 1234, generation 3
            shadow    ready, process 1240, generation 4
            crash     recovery exact, fence reaped, phase idle
            failovers 2; last 70 s ago: planned 0.8 ms
                      a new version
            ring 0    256 entries, 7 in flight, observer exact
            ┌ requests 6.2 k/s ────────────────────┐┌ latency p50 475 us p99 2.05 ms ──────┐┌ depth 7.5 ───────────────────────────┐
            │12 k/s│                      ⣼    ⢠⡇  ││4.1 ms│                      ⣼    ⢠⡇  ││15│                         ⣼     ⣼   │
            │      │                     ⡸⠘⡄  ⢀⠇⡇  ││      │                     ⡸⠘⡄  ⢀⠇⡇  ││  │                        ⡸⠘⡄   ⡸⢸   │
            │      │                    ⡰⠁ ⡇ ⢀⠎ ⢇  ││      │                    ⡰⠁ ⡇ ⢀⠎ ⢇  ││  │                       ⡰⠁ ⡇ ⢀⠎ ⠸⡀  │
            │      │                   ⢠⠃  ⡇ ⡜  ⢸ ⡜││      │                   ⢠⠃  ⡇ ⡜  ⢸ ⡜││  │                      ⡔⠁  ⡇ ⡜   ⡇ ⡜│
            │      │                  ⢠⠃   ⢸⡜   ⢸⡜ ││      │                  ⢠⠃ ⣀⢤⢸⡜ ⢀⡠⢸⡜ ││  │                     ⡜    ⢸⡜    ⣧⠊ │
            │0     │                  ⠃    ⠘    ⠘  ││0     │                  ⠃⠒⠉  ⠘⠔⠊⠁ ⠘⠔⠊││0 │                    ⠘     ⠘     ⠃  │
            └──────────────────────────────────────┘└──────────────────────────────────────┘└──────────────────────────────────────┘
            ┌ processors 0.35 ─────────────────────┐┌ memory 34 MiB ───────────────────────┐
            │0.70│                       ⢠⡇    ⣼   ││34 MiB│                  ⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉│
            │    │                      ⢀⠇⢣   ⡸⠘⡄  ││      │                               │
            │    │                     ⢀⠎ ⢸  ⡰⠁ ⡇  ││      │                               │
            │    │                     ⡜  ⢸ ⢠⠃  ⡇ ⡜││      │                               │
            │    │                    ⡜    ⣧⠃   ⢸⡜ ││      │                               │
            │0   │                   ⠘     ⠃    ⠘  ││0     │                               │
            └──────────────────────────────────────┘└──────────────────────────────────────┘

            EVENTS
            10:11:12.123 ShadowReady generation=4

            CONTEXT
            arrivals_per_s                  6 k/s   discard_share                       -   page_locality_share                 -
            completions_per_s             6.2 k/s   sequential_share                    -   device_write_share                  -
            depth_mean                        7.5   rings_busy                          -   host_cpu_pressure_share             -
            depth_max                           -   kick_due_share                      -   host_memory_pressure_share          -
            bytes_per_s                  24 MiB/s   kicks_per_s                         -   host_io_pressure_share              -
            size_mean_bytes                     -   call_due_share                      -   disk_busy_share                     -
            read_share                       70 %   calls_suppressed_per_s              -   disk_depth_mean                     -
            write_share                         -   working_set_pages                   -
            flush_share                         -   page_reuse                          -

            OUTCOME
            latency_mean_us                     -   error_share                         -   involuntary_switches_per_s          -
            latency_p50_us                 475 us   errors_per_s                      0/s   cpu_throttled_share                 -
            latency_p90_us                      -   retries_per_s                       -   wakes_per_s                         -
            latency_p99_us                2.05 ms   malformed_per_s                     -   polls_per_s                         -
            latency_p999_us                     -   calls_per_s                         -   referenced_bytes                    -
            latency_max_us                12.5 ms   call_reaction_us                    -   minor_faults_per_s                  -
            read_latency_p50_us                 -   call_reaction_max_us                -   major_faults_per_s                  -
            read_latency_p99_us                 -   call_overdue_us                     -   storage_read_bytes_per_s            -
            write_latency_p50_us                -   kick_overdue_us                     -   storage_write_bytes_per_s           -
            write_latency_p99_us                -   cpu_cores                        0.35   group_cpu_pressure_share            -
            flush_latency_p50_us                -   cpu_system_cores                    -   group_memory_pressure_share          -
            flush_latency_p99_us                -   cpu_per_request_us                  -   group_io_pressure_share             -
            oldest_age_us                  812 us   run_delay_share                     -   disk_wait_us                        -
            completion_gap_max_us               -   busiest_thread_cores                -   control_round_trip_us               -
            pickup_us                           -   voluntary_switches_per_s            -   canary_us                           -

            LIMIT
            rss_bytes                      34 MiB   memory_limit_share                  -   thread_limit_share                  -
            rss_anon_bytes                      -   descriptors                         -   ring_used_share                  12 %
            pss_bytes                           -   descriptor_limit_share              -   store_free_bytes                    -
             q quit  ? help  ↑↓ scroll  Esc back
        "#]],
    );
}

#[test]
fn device_page_in_a_small_terminal_scrolled_to_the_end() {
    check(
        &devices(),
        &[Key::Enter, Key::Last],
        (60, 15),
        &expect![[r#"
         warmswap top  3 devices, 1 protected, 1 warning, 1 error  …
        ring_used_share                  12 %
        store_free_bytes                    -
        store_used_share                    -

        QUALITY
        telemetry_age_us                    -
        latency_samples                   420
        inexact_share                       -
        ticks_lost                          -
        records_lost                        -
        sampler_delay_us                    -

        window 24 of backend 3, over 10 s; 0 records lost
         q quit  ? help  ↑↓ scroll  Esc back
    "#]],
    );
}

#[test]
fn device_page_without_a_profile() {
    check(
        &devices(),
        &[Key::Down, Key::Enter],
        (80, 15),
        &expect![[r#"
         warmswap top  3 devices, 1 protected, 1 warning, 1 error  /run/warmswap
        disk1  unprotected  risk -
        device    blk, VMM connected, socket /run/disk0.sock
        primary   active, process 1234, generation 3
        shadow    -
                  it ended with exit status: 7; the next start is in 2 s
        crash     recovery exact, fence reaped, phase idle
        failovers 2; last 70 s ago: planned 0.8 ms
                  a new version
        ring 0    256 entries, 7 in flight, observer exact

        no profile: this broker keeps none


         q quit  ? help  ↑↓ scroll  Esc back
    "#]],
    );
}

#[test]
fn device_page_of_a_dead_broker() {
    check(
        &devices(),
        &[Key::Last, Key::Enter],
        (80, 8),
        &expect![[r#"
         warmswap top  3 devices, 1 protected, 1 warning, 1 error  /run/warmswap
        gone  dead  risk -
        no broker answers: it ended without cleaning up




         q quit  ? help  ↑↓ scroll  Esc back
    "#]],
    );
}

#[test]
fn help_lies_over_the_page() {
    check(
        &devices(),
        &[Key::Help],
        (80, 18),
        &expect![[r#"
             warmswap top  3 devices, 1 protected, 1 warning, 1 error  /run/warmswap
            ▾DEVICE STATE         REQ/S  BYTES/S DEPTH     P99 ERR/S   CPU   MEMORY  REQ ▂▅█
            disk0   pro┌ help ──────────────────────────────────────────────────┐iB ▇▇█▂▂▃▄▅
            disk1   unp│up k, down j   select, scroll                           │ -
            gone    dea│page, g, G     far, to the first, to the last           │ -
                       │Enter          the page of a device                     │
                       │Esc            back to the list                         │
                       │s, S           sort by the next column, the previous    │
                       │q              quit                                     │
                       │                                                        │
                       │-              not measured                             │
                       │CPU            processors kept busy                     │
                       │OLDEST         age of the oldest request in flight      │
                       │RISK           how likely a failure is held to be       │
                       │▂▅█            the last windows, beside the greatest    │
                       └────────────────────────────────────────────────────────┘

             q quit  ? help  ↑↓ select  Enter open  s sort (by device)
        "#]],
    );
}

#[test]
fn every_size_can_be_drawn() {
    let mut many = devices();
    many.extend((0..300).map(|number| Device::absent(&format!("device-with-a-long-name-{number}"), "silent", "x")));
    for width in [1, 2, 39, 40, 41, 60, 79, 80, 119, 121, 400] {
        for height in [1, 2, 3, 7, 8, 9, 15, 24, 60, 200] {
            for keys in [&[][..], &[Key::Enter], &[Key::Enter, Key::Last], &[Key::Last, Key::Help]] {
                frame(&many, keys, (width, height));
            }
        }
    }
}

#[test]
fn absurd_measures_can_be_drawn() {
    let absurd =
        [json!(1e308), json!(-1e308), json!(f64::MIN_POSITIVE), json!("x"), json!(null), json!(1e16), json!(0)];
    let windows: Vec<Value> = (0..60)
        .map(|number| {
            let values = warmswap_predict::FEATURES.iter().zip(number..);
            let values: serde_json::Map<String, Value> =
                values.map(|(spec, at)| (spec.name.to_owned(), absurd[at % absurd.len()].clone())).collect();
            json!({"number": number, "values": values})
        })
        .collect();
    let device = Device::read("disk", &status("protected"), Some(&json!({ "windows": windows })));
    for size in [(60, 15), (80, 24), (200, 100)] {
        for keys in [&[][..], &[Key::Enter], &[Key::Enter, Key::Last]] {
            frame(std::slice::from_ref(&device), keys, size);
        }
    }
}

#[test]
fn a_broker_that_says_nothing_more_is_silent_and_comes_back() {
    let (mut known, start, patience) = (Known::default(), Instant::now(), Duration::from_secs(4));
    let [_, device, dead] = devices().try_into().expect("three");
    known.take(device.clone(), start);
    known.take(dead, start);
    assert!(!known.age(start + patience, patience));
    let later = start + Duration::from_secs(5);
    assert!(known.age(later, patience));
    let state = |known: &Known, name: &str| known.0[name].0.state.clone();
    assert_eq!((state(&known, "disk0").as_str(), state(&known, "gone").as_str()), ("silent", "dead"));
    assert!(known.0["disk0"].0.profile.is_none());
    known.take(device, later);
    assert!(!known.age(later, patience));
    assert_eq!(state(&known, "disk0"), "protected");
}

#[test]
fn the_time_between_questions_has_bounds() {
    assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
    for wrong in ["0", "-1", "nan", "inf", "1e300", "x", ""] {
        assert!(seconds(wrong).is_err(), "{wrong}");
    }
}
