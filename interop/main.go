// Command interop converts images with the converter of the Nydus snapshotter, which is also nydusify's, and back.
//
// The converter calls the program nydus-image for every layer, and once more to merge them. Which one, the environment
// variable NYDUS_BUILDER says, or else PATH.
//
//	interop convert [-oci-ref] [-compressor NAME] [-batch-size SIZE] SOURCE TARGET
//	interop reverse SOURCE TARGET
//
// SOURCE and TARGET are references in a registry without TLS.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	images_converter "github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/nydus-snapshotter/pkg/converter"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "interop:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) == 0 || arguments[0] != "convert" && arguments[0] != "reverse" {
		return fmt.Errorf("convert or reverse")
	}
	flags := flag.NewFlagSet(arguments[0], flag.ExitOnError)
	ociRef := flags.Bool("oci-ref", false, "keep gzip layers and make indexes over them")
	compressor := flags.String("compressor", "", "how chunks are compressed")
	batchSize := flags.String("batch-size", "", "bytes of a batch of small chunks")
	if err := flags.Parse(arguments[1:]); err != nil {
		return err
	}
	if flags.NArg() != 2 {
		return fmt.Errorf("want SOURCE and TARGET, got %q", flags.Args())
	}
	work, err := os.MkdirTemp("", "interop-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	store, err := local.NewLabeledStore(work, newLabels())
	if err != nil {
		return err
	}
	function := images_converter.IndexConvertFuncWithHook(
		converter.LayerConvertFunc(converter.PackOption{
			FsVersion: "6", OCIRef: *ociRef, Compressor: *compressor, BatchSize: *batchSize,
		}),
		true,
		platforms.All,
		images_converter.ConvertHooks{PostConvertHook: converter.ConvertHookFunc(converter.MergeOption{
			FsVersion: "6", OCIRef: *ociRef, OCI: true,
		})},
	)
	if arguments[0] == "reverse" {
		function = converter.DefaultIndexConvertFunc(
			converter.LayerReconvertFunc(converter.UnpackOption{}), false, platforms.All,
		)
	}
	return convert(store, function, flags.Arg(0), flags.Arg(1))
}

// convert pulls an image, lets function make another one of it, and pushes that.
func convert(store content.Store, function images_converter.ConvertFunc, source, target string) error {
	ctx := namespaces.WithNamespace(context.Background(), "interop")
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts)),
	})
	name, root, err := resolver.Resolve(ctx, source)
	if err != nil {
		return fmt.Errorf("resolve: %w", err)
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return err
	}
	pull := images.Handlers(remotes.FetchHandler(store, fetcher), images.ChildrenHandler(store))
	if err := images.Dispatch(ctx, pull, nil, root); err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	converted, err := function(ctx, store, root)
	if err != nil {
		return fmt.Errorf("convert: %w", err)
	}
	if converted == nil {
		return fmt.Errorf("nothing of %s was converted", source)
	}
	pusher, err := resolver.Pusher(ctx, target)
	if err != nil {
		return err
	}
	if err := remotes.PushContent(ctx, pusher, *converted, store, nil, platforms.All, nil); err != nil {
		return fmt.Errorf("push: %w", err)
	}
	fmt.Println(target, converted.Digest)
	return nil
}

// labels keeps the labels of contents in memory.
type labels struct {
	lock sync.Mutex
	of   map[digest.Digest]map[string]string
}

func newLabels() *labels {
	return &labels{of: map[digest.Digest]map[string]string{}}
}

func (l *labels) Get(id digest.Digest) (map[string]string, error) {
	l.lock.Lock()
	defer l.lock.Unlock()
	found := map[string]string{}
	for key, value := range l.of[id] {
		found[key] = value
	}
	return found, nil
}

func (l *labels) Set(id digest.Digest, labels map[string]string) error {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.of[id] = labels
	return nil
}

func (l *labels) Update(id digest.Digest, labels map[string]string) (map[string]string, error) {
	known, err := l.Get(id)
	if err != nil {
		return nil, err
	}
	for key, value := range labels {
		known[key] = value
		if value == "" {
			delete(known, key)
		}
	}
	return known, l.Set(id, known)
}
