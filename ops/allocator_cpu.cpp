// torch's allocator for a CPU, for blocks of 128 KiB and more: what is freed is kept for the next block of about its size,
// but never so much that the process takes more than its tensors took at their peak.
//
// glibc's malloc keeps freed blocks in one heap, where rows of samples of ever new lengths leave holes that later blocks
// do not fit: twice the memory of the tensors after some steps. Mapped one by one (M_MMAP_THRESHOLD) they leave none, but
// every page of every block is then cleared again by the kernel, which takes a tenth of the time of a step.
//
// Here a block has an address range of its own, an eighth larger than it must be, so that a block of a similar size can
// follow it there; only pages that were written to take memory. `resident` counts these, of blocks in use and kept.
#include <c10/core/Allocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace {

constexpr size_t page = 4096, smallest = size_t(128) << 10, alignment = 64;
constexpr size_t slack = size_t(32) << 20;  // bytes above the peak of the tensors that kept blocks may take
constexpr size_t most_times_larger = 16;    // of 4, 16 and any, this has the fewest page faults (SmolLM2-135M, GSM8K)

size_t whole_pages(size_t bytes) { return (bytes + page - 1) / page * page; }

struct Block {
    char* range;
    size_t capacity, written, size;  // bytes: of the address range, of its pages that take memory, in use
    size_t offset;                   // of the tensor in the range
};

struct KeepingAllocator final : c10::Allocator {
    std::mutex mutex;
    std::unordered_map<void*, Block> used;
    std::list<Block> kept;  // the one freed last in front
    size_t live = 0, peak = 0, resident = 0, maps = 0;
    size_t most = SIZE_MAX;  // bytes that `resident` may reach: what would need more is refused

    c10::DataPtr allocate(size_t bytes) override {
        void* data = bytes < smallest ? from_malloc(bytes) : take(bytes);
        return {data, data, &free_block, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &free_block; }

    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

    static void* from_malloc(size_t bytes) {
        void* data = nullptr;
        if (bytes && posix_memalign(&data, alignment, bytes)) refuse(bytes);
        return data;
    }

    [[noreturn]] static void refuse(size_t bytes) {
        TORCH_CHECK(false, "can't allocate memory: you tried to allocate ", bytes, " bytes.");
        std::abort();
    }

    void* take(size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex);
        size_t size = whole_pages(bytes + page);
        Block block{nullptr, 0, 0, size, 0};
        auto found = kept_range(size, size + size / 4);
        // A range much too large is still better than to drop others and have the kernel clear new pages: a small
        // micro-batch after a large one finds the large one's.
        if (found == kept.end() && resident + size > peak + slack) found = kept_range(size, most_times_larger * size);
        if (found != kept.end()) {
            block = *found;
            block.size = size;
            kept.erase(found);
        }
        size_t peak_before = peak;
        live += size;
        peak = std::max(peak, live);
        if (block.written < size) {
            size_t more = size - block.written;
            make_room(more);
            if (more > most || resident > most - more) {
                if (block.range) kept.push_front(block);
                live -= size, peak = peak_before;
                refuse(bytes);
            }
            resident += more;
        }
        if (!block.range) {
            // Tensors that all begin at the start of a page would compete for the same places in the caches.
            block.offset = alignment * (maps++ % (page / alignment));
            block.capacity = whole_pages(size + size / 8);
            void* range = map(block.capacity);
            if (range == MAP_FAILED) {  // perhaps for a limit on addresses, used or not: those of no use go
                drop_until(0);
                trim_used(true);
                range = map(block.capacity = size);
            }
            if (range == MAP_FAILED) {
                live -= size, resident -= size, peak = peak_before;
                refuse(bytes);
            }
            block.range = static_cast<char*>(range);
        }
        block.written = std::max(block.written, size);
        void* data = block.range + block.offset;
        used[data] = block;
        return data;
    }

    // The kept block with the smallest range of at least `size` and at most `most` bytes, or kept.end().
    std::list<Block>::iterator kept_range(size_t size, size_t most) {
        auto found = kept.end();
        for (auto it = kept.begin(); it != kept.end(); ++it)
            if (it->capacity >= size && it->capacity <= most &&
                (found == kept.end() || it->capacity < found->capacity))
                found = it;
        return found;
    }

    static void* map(size_t bytes) {
        return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }

    // Give back what was freed longest ago, and then what blocks in use have behind their end, until `bytes` more fit.
    void make_room(size_t bytes) {
        size_t limit = std::min(peak + slack, most);
        limit = limit > bytes ? limit - bytes : 0;
        drop_until(limit);
        if (resident > limit) trim_used(false);
    }

    // Give back what blocks in use have behind their end: the memory, or also the addresses.
    void trim_used(bool addresses) {
        for (auto& [data, block] : used) {
            char* end = block.range + block.size;
            if (addresses && block.capacity > block.size) {
                munmap(end, block.capacity - block.size);
                block.capacity = block.size;
            } else if (block.written > block.size) {
                madvise(end, block.written - block.size, MADV_DONTNEED);
            }
            resident -= block.written - block.size;
            block.written = block.size;
        }
    }

    void drop_until(size_t limit) {
        while (resident > limit && !kept.empty()) {
            munmap(kept.back().range, kept.back().capacity);
            resident -= kept.back().written;
            kept.pop_back();
        }
    }

    void give_back(void* data) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            auto found = used.find(data);
            if (found != used.end()) {
                live -= found->second.size;
                kept.push_front(found->second);
                used.erase(found);
                return;
            }
        }
        std::free(data);
    }

    static void free_block(void* data);
};

KeepingAllocator& allocator() {
    static auto* the_one = new KeepingAllocator;  // never destroyed: tensors may outlive everything else
    return *the_one;
}

void KeepingAllocator::free_block(void* data) {
    if (data) allocator().give_back(data);
}

}  // namespace

// From now on torch's tensors on the CPU come from here; those made before are freed as they were made.
extern "C" void use_keeping_allocator() { c10::SetAllocator(c10::DeviceType::CPU, &allocator(), 1); }

// From now on refuse blocks with which `resident` would grow by more than this many bytes; below 0: grant all.
extern "C" void limit_growth(int64_t bytes) {
    std::lock_guard<std::mutex> lock(allocator().mutex);
    allocator().most = bytes < 0 ? SIZE_MAX : allocator().resident + bytes;
}

// Bytes: of tensors now and at their peak, and of pages that blocks of 128 KiB and more take.
extern "C" void allocator_counts(int64_t* live, int64_t* peak, int64_t* resident) {
    std::lock_guard<std::mutex> lock(allocator().mutex);
    *live = allocator().live, *peak = allocator().peak, *resident = allocator().resident;
}
