// Threads that stay: a job is a function of chunks, claimed one by one. Whoever calls works too and
// never waits for a thread that has not claimed a chunk, so that a late or sleeping thread costs
// nothing. One job at a time: a second caller works alone meanwhile. After a fork the child has no
// threads and starts its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>

namespace {

class Pool {
    // epoch (24 bits), chunks (20), next chunk (20): a claim is one exchange, which fails where the
    // job has changed meanwhile
    static constexpr uint64_t LOW = (1 << 20) - 1;
    std::atomic<uint64_t> state{0};
    std::atomic<int64_t> done{0}, sleeping{0}, allowed{0};
    void (*work)(void *, int64_t) = nullptr;
    void *job = nullptr;
    std::mutex one_job, sleep;
    std::condition_variable wake;
    int64_t threads = 0;

    bool claim(uint64_t epoch) {
        uint64_t seen = state.load();
        while (seen >> 40 == epoch && (seen & LOW) < (seen >> 20 & LOW)) {
            if (state.compare_exchange_weak(seen, seen + 1)) {
                work(job, (int64_t)(seen & LOW));
                done.fetch_add(1);
                return true;
            }
        }
        return false;
    }

    void stay(int64_t id) {
        uint64_t epoch = 0;
        for (;;) {
            for (int spin = 0; spin < 4000 && state.load() >> 40 == epoch; spin++)
                relax();
            if (state.load() >> 40 == epoch) {
                std::unique_lock<std::mutex> lock(sleep);
                sleeping.fetch_add(1);
                wake.wait(lock, [&] { return state.load() >> 40 != epoch; });
                sleeping.fetch_sub(1);
            }
            epoch = state.load() >> 40;
            while (id < allowed.load() && claim(epoch)) {
            }
        }
    }

  public:
    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }

    static constexpr int64_t MOST_CHUNKS = LOW;

    void run(int64_t chunks, int64_t wanted, void (*function)(void *, int64_t), void *argument) {
        std::unique_lock<std::mutex> lock(one_job, std::try_to_lock);
        if (chunks < 2 || wanted < 2 || !lock.owns_lock()) {
            for (int64_t i = 0; i < chunks; i++)
                function(argument, i);
            return;
        }
        for (; threads < wanted - 1; threads++) {
            try {
                std::thread([this, id = threads] { stay(id); }).detach();
            } catch (const std::system_error &) {
                break;  // no more threads to be had: fewer work
            }
        }
        work = function, job = argument;
        allowed.store(wanted - 1), done.store(0);
        uint64_t epoch = ((state.load() >> 40) + 1) & ((1 << 24) - 1);
        state.store(epoch << 40 | (uint64_t)chunks << 20);
        if (sleeping.load()) {
            std::lock_guard<std::mutex> quiet(sleep);
            wake.notify_all();
        }
        while (claim(epoch)) {
        }
        for (int64_t spin = 0; done.load() < chunks; spin++)
            spin < 4000 ? relax() : std::this_thread::yield();
    }

    static Pool &here() {
        static std::mutex lock;
        static Pool *pool = nullptr;
        static pid_t owner = 0;
        std::lock_guard<std::mutex> guard(lock);
        if (owner != getpid())
            pool = new Pool, owner = getpid();  // never deleted: its threads stay
        return *pool;
    }
};

}  // namespace
